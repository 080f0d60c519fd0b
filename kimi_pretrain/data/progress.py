"""Telling a person how far a long job is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

# (what is being done, done so far, of how much); units are the caller's, bytes mostly.
Progress = Callable[[str, int, int], None]

SECONDS_BETWEEN_LINES = 5.0


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""


@contextmanager
def console() -> Iterator[Progress]:
    """Progress on stderr: a rich bar if that is a terminal, else a line every five seconds."""
    if not sys.stderr.isatty():
        yield plain_lines(sys.stderr.write)
        return
    with ExitStack() as stack:
        bars: Progress | None = None

        def show(stage: str, done: int, total: int) -> None:
            nonlocal bars
            # Nothing appears, and rich is not even imported, until there is something to tell.
            if bars is None:
                bars = stack.enter_context(_bars())
            bars(stage, done, total)

        yield show


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description:<36}"),
        progress.BarColumn(),
        progress.TextColumn("{task.percentage:>3.0f}%"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as display:
        tasks: dict[str, progress.TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage)
            display.update(tasks[stage], completed=done, total=max(total, 1))

        yield show


def plain_lines(write: Callable[[str], object]) -> Progress:
    """A line when a stage begins, every five seconds, and when it ends."""
    told: dict[str, float] = {}

    def show(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage in told and done < total and now - told[stage] < SECONDS_BETWEEN_LINES:
            return
        told[stage] = now
        write(f"{stage}: {100 * done // max(total, 1)}%\n")

    return show
