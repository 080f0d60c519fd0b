"""What a person sees while a run trains.

``Console`` decides what is said, a ``View`` how it looks: one live line on a terminal
(``live.py``), plain lines that read well in a log file and under ``grep`` elsewhere.
"""

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self, TextIO

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import LoggingConfig
from kimi_pretrain.telemetry.pace import Pace
from kimi_pretrain.telemetry.quantities import (
    count,
    decimal,
    duration,
    percent,
    printable,
    progress,
)

KINDS = ("auto", "live", "plain", "off")
NO_FACTS: Mapping[str, str] = MappingProxyType({})


class Console:
    """Shows a run on ``stream``, standard output by default, as ``logging.console`` says.

    ``auto`` is ``live`` on a terminal and ``plain`` elsewhere. ``note`` may be called at any
    time, also before ``start`` and after ``close``.

    Raises:
        ConfigError: ``logging.console`` names no such kind.
    """

    def __init__(self, logging: LoggingConfig, stream: TextIO | None = None) -> None:
        self._view = _view(logging, sys.stdout if stream is None else stream)
        self._pace = Pace()
        self._total = 0

    def start(self, total_steps: int, step: int = 0, facts: Mapping[str, str] = NO_FACTS) -> None:
        """Begins after ``step`` finished steps; ``facts``, label to text, are shown once."""
        self._total = total_steps
        if facts:
            self._view.table({label: printable(text) for label, text in facts.items()})
        self._view.start(step, total_steps)

    def step(self, row: Mapping[str, Any]) -> None:
        """Takes a step's row, the one that goes to metrics.jsonl."""
        self._pace.step(row["step_seconds"])
        self._view.status(row["step"], self._total, step_figures(row, self._total, self._pace))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Takes an evaluation's row, the one that goes to evals.jsonl."""
        self._view.line(evaluation_figures(row, self._total))

    def note(self, text: str) -> None:
        """Says what is not a number, e.g. that a checkpoint was restored."""
        self._view.note(printable(text))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Shows the end of a run: held-out loss beside a bigram model's, cost, sample."""
        self._view.close()
        self._view.table(summary_figures(summary))
        if summary.get("sample"):
            self._view.sample(printable(summary.get("prompt", "")), printable(summary["sample"]))

    def close(self) -> None:
        """Gives the terminal back; a second call does nothing."""
        self._view.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class View(Protocol):
    """How things are shown. Every text it gets is safe to print."""

    def start(self, step: int, total: int) -> None: ...

    def status(self, step: int, total: int, figures: Mapping[str, str]) -> None: ...

    def line(self, figures: Mapping[str, str]) -> None: ...

    def note(self, text: str) -> None: ...

    def table(self, rows: Mapping[str, str]) -> None: ...

    def sample(self, prompt: str, text: str) -> None: ...

    def close(self) -> None: ...


class SilentView:
    """Shows nothing."""

    def start(self, step: int, total: int) -> None:
        pass

    def status(self, step: int, total: int, figures: Mapping[str, str]) -> None:
        pass

    def line(self, figures: Mapping[str, str]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def table(self, rows: Mapping[str, str]) -> None:
        pass

    def sample(self, prompt: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class PlainView:
    """One line every ``interval`` steps, at the first step of this start and at the last."""

    def __init__(self, stream: TextIO, interval: int) -> None:
        self._stream = stream
        self._interval = max(1, interval)
        self._first = 1

    def start(self, step: int, total: int) -> None:
        self._first = step + 1

    def status(self, step: int, total: int, figures: Mapping[str, str]) -> None:
        if step % self._interval == 0 or step in (self._first, total):
            self.line(figures)

    def line(self, figures: Mapping[str, str]) -> None:
        self.note("  ".join(f"{label} {value}" for label, value in figures.items()))

    def note(self, text: str) -> None:
        # A log file's encoding may lack a character that the text has.
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()

    def table(self, rows: Mapping[str, str]) -> None:
        width = max(map(len, rows), default=0)
        for label, text in rows.items():
            self.note(f"{label:<{width}}  {text}")

    def sample(self, prompt: str, text: str) -> None:
        self.note("sample")
        for line in (prompt + text).splitlines():
            self.note(f"  {line}")

    def close(self) -> None:
        pass


def _view(logging: LoggingConfig, stream: TextIO) -> View:
    kind = logging.console
    if kind not in KINDS:
        raise ConfigError(
            what="logging.console",
            value=kind,
            rule=f"it is one of {', '.join(KINDS)}",
            fix="logging.console=auto",
        )
    if kind == "auto":
        kind = "live" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    if kind == "live":
        from kimi_pretrain.telemetry.live import LiveView

        return LiveView(stream)
    return PlainView(stream, logging.console_interval) if kind == "plain" else SilentView()


def step_figures(row: Mapping[str, Any], total: int, pace: Pace) -> dict[str, str]:
    """The figures of a step, label to text, in widths that hold still from row to row."""
    remaining = pace.remaining(total - row["step"])
    return {
        "step": progress(row["step"], total),
        "loss": decimal(row["loss"], 4),
        "tokens/s": f"{count(row['tokens_per_second']):>5}",
        "MFU": f"{percent(row.get('mfu')):>4}",
        "max logit": f"{decimal(row['max_logit'], 1):>5}",
        "ETA": "-" if remaining is None else duration(remaining),
    }


def evaluation_figures(row: Mapping[str, Any], total: int) -> dict[str, str]:
    """An evaluation: the loss on held-out text, and how many bits a byte of it costs."""
    figures = {
        "step": progress(row["step"], total),
        "held-out loss": decimal(row["heldout_loss"], 4),
    }
    if row.get("bits_per_byte") is not None:
        figures["bits/byte"] = decimal(row["bits_per_byte"], 4)
    return figures


def summary_figures(summary: Mapping[str, Any]) -> dict[str, str]:
    """The end of a run in words, what was not measured left out."""
    figures = {}
    if summary.get("heldout_loss") is not None:
        figures["held-out loss"] = f"{decimal(summary['heldout_loss'], 4)} nats/token"
        if summary.get("bits_per_byte") is not None:
            figures["held-out loss"] += f", {decimal(summary['bits_per_byte'], 4)} bits/byte"
    if summary.get("bigram_loss") is not None:
        figures["bigram model"] = (
            f"{decimal(summary['bigram_loss'], 4)} nats/token on the same tokens"
        )
    if summary.get("tokens") is not None:
        figures["trained on"] = f"{count(summary['tokens'])} tokens"
        if summary.get("seconds") is not None:
            figures["trained on"] += f" in {duration(summary['seconds'])}"
    return figures
