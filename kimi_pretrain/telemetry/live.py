"""The live line: one quiet row at the foot of the terminal, everything else above it."""

import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kimi_pretrain.telemetry.quantities import progress

# Figures that leave the line first when the terminal is narrow.
_DISPENSABLE = ("max logit", "MFU", "tokens/s", "ETA", "loss")
_BAR_MIN, _BAR_MAX = 10, 40
# Between two drawings, in seconds; faster than this nobody reads.
_REFRESH = 0.1


class LiveView:
    """Draws the line when a step arrives, without a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._console = RichConsole(file=stream, force_terminal=True, highlight=False)
        self._live: Live | None = None
        self._drawn = 0.0

    def start(self, step: int, total: int) -> None:
        line = StatusLine(step, total, {"step": progress(step, total)})
        self._live = Live(line, console=self._console, auto_refresh=False)
        self._live.start(refresh=True)

    def status(self, step: int, total: int, figures: Mapping[str, str]) -> None:
        if self._live is None:
            return
        now = time.monotonic()
        due = now - self._drawn >= _REFRESH or step == total
        self._live.update(StatusLine(step, total, figures), refresh=due)
        if due:
            self._drawn = now

    def line(self, figures: Mapping[str, str]) -> None:
        self._above(_sentence(figures))

    def note(self, text: str) -> None:
        self._above(Text(text, style="dim"))

    def table(self, rows: Mapping[str, str]) -> None:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for label, text in rows.items():
            grid.add_row(Text(label, style="dim"), Text(text))
        self._apart(grid)

    def sample(self, prompt: str, text: str) -> None:
        self._console.print(Text("sample", style="dim"))
        whole = Text.assemble((prompt, "dim"), text)
        self._apart(Padding(whole, (0, 2), expand=False))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print()

    def _above(self, body: RenderableType) -> None:
        if self._live is not None:
            self._live.refresh()  # else the line repeats what it last showed, below the news
        self._console.print(body)

    def _apart(self, body: RenderableType) -> None:
        self._console.print(body)
        self._console.print()


class StatusLine:
    """Progress bar and figures in one row that never wraps."""

    def __init__(self, step: int, total: int, figures: Mapping[str, str]) -> None:
        self._step, self._total, self._figures = step, total, figures

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        figures = dict(self._figures)
        position = Text(figures.pop("step"), style="bold")

        def room() -> int:
            return options.max_width - position.cell_len - _sentence(figures).cell_len - 6

        for label in _DISPENSABLE:
            if room() >= _BAR_MIN:
                break
            figures.pop(label, None)
        bar = ProgressBar(
            total=max(1, self._total),
            completed=self._step,
            width=max(1, min(room(), _BAR_MAX)),
            style="bright_black",
            complete_style="cyan",
            finished_style="green",
        )
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(position, bar, _sentence(figures))
        yield row


def _sentence(figures: Mapping[str, str]) -> Text:
    """Labels dimmed, values plain, two blanks between pairs."""
    text = Text(no_wrap=True)
    for index, (label, value) in enumerate(figures.items()):
        text.append("  " * bool(index))
        text.append(f"{label} ", style="dim")
        text.append(value)
    return text
