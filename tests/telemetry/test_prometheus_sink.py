"""The file for node-exporter, read back by Prometheus' own parser."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config, LoggingConfig
from kimi_pretrain.telemetry.breakdown import PARTS, Seat, comparison
from kimi_pretrain.telemetry.nvml import READINGS, device_comparison
from kimi_pretrain.telemetry.prometheus_sink import METRICS, PrometheusSink
from kimi_pretrain.telemetry.sinks import open_sinks

STEP: dict[str, Any] = {
    "step": 7, "tokens": 3584, "loss": 2.5, "aux_loss": 0.1, "learning_rate": 1e-3,
    "grad_norm": math.nan, "max_logit": -math.inf, "clipped_heads": 0.0, "load_max_over_mean": 1.5,
    "step_seconds": 2.0, "tokens_per_second": 256.0, "mfu": 0.31, "goodput": 0.9,
    "checkpoint_seconds": 0.0, **{f"{part}_seconds": 0.25 for part in PARTS},
}  # fmt: skip


def ranks_row() -> dict[str, Any]:
    seats = [Seat("a", 0), Seat("b", 0)]
    parts = [dict.fromkeys(PARTS, 1.0), dict.fromkeys(PARTS, 2.0)]
    reading = dict.fromkeys(READINGS, 0.0) | {"temperature_celsius": 70.0}
    hot = reading | {"throttle_reasons": 64.0}
    return {"step": 7, **comparison(parts, seats), **device_comparison([reading, hot], seats)}


def parsed(path: Path) -> dict[str, tuple[str, dict[tuple[tuple[str, str], ...], float]]]:
    """metric -> (type, labels without the run -> value)."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        values = {
            tuple(sorted((k, v) for k, v in sample.labels.items() if k != "run")): sample.value
            for sample in family.samples
        }
        assert {sample.labels["run"] for sample in family.samples} == {path.parent.name}
        assert all(sample.timestamp is None for sample in family.samples)
        found[family.samples[0].name.removeprefix("kimi_pretrain_")] = (family.type, values)
    return found


def test_prometheus_reads_what_was_written(tmp_path: Path) -> None:
    """Catches a type that is not the metric's, Python's nan and inf, and a part without label."""
    sink = PrometheusSink(tmp_path)
    sink.row("step", STEP)
    sink.row("eval", {"step": 7, "heldout_loss": 2.25})
    sink.row("layers", {"step": 7, "max_logits": [[1.0]]})
    sink.row("ranks", ranks_row())
    sink.close()
    found = parsed(tmp_path / "metrics.prom")
    assert found.keys() == METRICS.keys()
    assert {name: kind for name, (kind, _) in found.items()} == {
        name: kind for name, (kind, _) in METRICS.items()
    }
    assert found["steps_total"][1] == {(): 7.0}
    assert found["loss"][1] == {(): 2.5}
    assert math.isnan(found["grad_norm"][1][()])
    assert found["max_logit"][1] == {(): -math.inf}
    assert found["step_part_seconds"][1] == {(("part", part),): 0.25 for part in PARTS}
    assert found["rank_part_seconds"][1][(("over_ranks", "max"), ("part", "ep"))] == 2.0
    assert found["gpu_temperature_celsius"][1][(("over_ranks", "max"),)] == 70.0
    assert found["gpus_unhealthy"][1] == {(): 1.0}


def test_a_run_directory_s_name_cannot_break_the_format(tmp_path: Path) -> None:
    """Catches a quote in a name that ends the label and makes the collector drop the file."""
    run_dir = tmp_path / 'a "b" \\ c'
    sink = PrometheusSink(run_dir)
    sink.row("step", STEP)
    assert parsed(run_dir / "metrics.prom")["loss"][1] == {(): 2.5}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Catches writing in place: a collector that comes meanwhile reads a file cut short."""
    sink, path = PrometheusSink(tmp_path), tmp_path / "metrics.prom"
    sink.row("step", STEP)
    whole, seen, done = len(path.read_text().splitlines()), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(len(path.read_text().splitlines()))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):
        sink.row("step", STEP)
    done.set()
    reader.join()
    assert seen <= {whole}
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.prom"]


def test_the_collector_s_directory_can_be_named(tmp_path: Path) -> None:
    """Catches a file that node-exporter never sees because it is in the run directory."""
    collector = tmp_path / "textfile"
    collector.mkdir()
    logging = LoggingConfig(sinks=["prometheus"], prometheus_file=str(collector / "kimi.prom"))
    with open_sinks(Config(logging=logging), tmp_path / "run") as sinks:
        sinks.row("step", STEP)
    assert "kimi_pretrain_loss" in (collector / "kimi.prom").read_text()


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Catches a run that trains for hours before its first row finds no directory."""
    with pytest.raises(ConfigError, match=r"logging\.prometheus_file: got '.*/nowhere/kimi\.prom'"):
        PrometheusSink(tmp_path, str(tmp_path / "nowhere" / "kimi.prom"))
