"""The newest figures of a run as one file for Prometheus, by node-exporter's textfile collector.

The text exposition format 0.0.4: gauges and counters without timestamps, in base units. The
collector may read at any moment, so the file is replaced whole; what lies beside it meanwhile
does not end in ``.prom``.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry.breakdown import PARTS

FILE = "metrics.prom"


class Sample(NamedTuple):
    """One value, and what tells it from others of its metric."""

    metric: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


# metric -> (type, what it is)
METRICS: Mapping[str, tuple[str, str]] = {
    "steps_total": ("counter", "Optimizer steps done."),
    "tokens_total": ("counter", "Tokens trained on."),
    "last_step_timestamp_seconds": ("gauge", "When the last step was done."),
    "loss": ("gauge", "Training loss in nats a token."),
    "learning_rate": ("gauge", "Learning rate of the last step."),
    "grad_norm": ("gauge", "Global gradient norm before clipping."),
    "max_logit": ("gauge", "Largest attention logit, or its bound."),
    "clipped_heads_ratio": ("gauge", "Share of heads that QK-Clip scaled down."),
    "expert_load_max_over_mean": ("gauge", "Fullest expert over the mean."),
    "tokens_per_second": ("gauge", "Tokens a second, all ranks together."),
    "mfu_ratio": ("gauge", "Model FLOP/s over peak."),
    "goodput_ratio": ("gauge", "Seconds in steps that count over seconds since the first start."),
    "step_seconds": ("gauge", "Duration of the last step."),
    "step_part_seconds": ("gauge", "What rank 0 spent the last step on."),
    "checkpoint_seconds": ("gauge", "For how long the checkpoint before this step held it up."),
    "heldout_loss": ("gauge", "Loss on held-out text in nats a token."),
    "rank_part_seconds": ("gauge", "Seconds of a step by part, over all ranks."),
    "straggler_rank": ("gauge", "The rank that is slowest beside the others of its stage."),
    "straggler_ratio": ("gauge", "How many times the median of its stage that rank needs."),
    "gpu_power_watts": ("gauge", "Power of a GPU, over all ranks."),
    "gpu_temperature_celsius": ("gauge", "Temperature of a GPU, over all ranks."),
    "gpu_sm_clock_hertz": ("gauge", "Clock of a GPU's multiprocessors, over all ranks."),
    "gpus_unhealthy": ("gauge", "GPUs that throttle, report ECC errors or do not answer."),
}
_OF_STEP = {
    "steps_total": "step",
    "tokens_total": "tokens",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "max_logit": "max_logit",
    "clipped_heads_ratio": "clipped_heads",
    "expert_load_max_over_mean": "load_max_over_mean",
    "tokens_per_second": "tokens_per_second",
    "mfu_ratio": "mfu",
    "goodput_ratio": "goodput",
    "step_seconds": "step_seconds",
    "checkpoint_seconds": "checkpoint_seconds",
}


class PrometheusSink:
    """Keeps the newest row of each kind and writes them all at every step."""

    def __init__(self, run_dir: Path, file: str | None = None) -> None:
        """A sink.

        Args:
            run_dir: its last part is the label ``run``.
            file: where to write; None: ``metrics.prom`` in the run directory.

        Raises:
            ConfigError: the file's directory does not exist or cannot be written.
        """
        self._path = run_dir / FILE if file is None else Path(file)
        self._run = run_dir.resolve().name
        self._newest: dict[str, list[Sample]] = {}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._replace("")
        except OSError as error:
            rule = f"a file in a directory to write to ({error.strerror})"
            fix = "logging.prometheus_file=null, which writes into run_dir"
            raise ConfigError("logging.prometheus_file", str(self._path), rule, fix) from error

    def row(self, kind: str, values: dict[str, Any]) -> None:
        self._newest[kind] = list(samples(kind, values, time.time))
        if kind in ("step", "eval", "ranks"):
            every = [sample for newest in self._newest.values() for sample in newest]
            self._replace(exposition(every, self._run))

    def close(self) -> None:
        """Leaves the file as it is: its timestamp says how old it is."""

    def _replace(self, text: str) -> None:
        beside = self._path.with_name(self._path.name + ".tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(self._path)


def samples(kind: str, row: Mapping[str, Any], clock: Callable[[], float]) -> Iterator[Sample]:
    """What a row says, as samples of ``METRICS``; arrays by layer say nothing here."""
    match kind:
        case "step":
            yield Sample("last_step_timestamp_seconds", clock())
            for metric, field in _OF_STEP.items():
                if row.get(field) is not None:
                    yield Sample(metric, float(row[field]))
            for part in PARTS:
                if f"{part}_seconds" in row:
                    value = row[f"{part}_seconds"]
                    yield Sample("step_part_seconds", value, (("part", part),))
        case "eval":
            yield Sample("heldout_loss", row["heldout_loss"])
        case "ranks":
            for part, spread in row["parts"].items():
                for over, value in spread.items():
                    labels = (("part", part), ("over_ranks", over))
                    yield Sample("rank_part_seconds", value, labels)
            yield Sample("straggler_rank", row["straggler"])
            yield Sample("straggler_ratio", row["straggler_ratio"])
            for reading, spread in row.get("devices", {}).items():
                for over, value in spread.items():
                    yield Sample(f"gpu_{reading}", value, (("over_ranks", over),))
            if "unhealthy" in row:
                yield Sample("gpus_unhealthy", len(row["unhealthy"]))


def exposition(values: list[Sample], run: str) -> str:
    """The samples as text, a metric's together, each with the label ``run``."""
    lines = []
    for metric, (kind, meaning) in METRICS.items():
        of_metric = [sample for sample in values if sample.metric == metric]
        if not of_metric:
            continue
        name = f"kimi_pretrain_{metric}"
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        for sample in of_metric:
            labels = ",".join(f'{k}="{_escaped(v)}"' for k, v in (("run", run), *sample.labels))
            lines.append(f"{name}{{{labels}}} {_number(sample.value)}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    """As Go's ParseFloat reads it, which knows NaN and +Inf but not Python's nan and inf."""
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(repr(float(value)), repr(float(value)))
