"""`kimi-pretrain top RUN`: a run at a glance, in the terminal, from its files alone."""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry.breakdown import PARTS, SLOW
from kimi_pretrain.telemetry.pace import Pace
from kimi_pretrain.telemetry.quantities import (
    count,
    decimal,
    duration,
    percent,
    printable,
    progress,
)
from kimi_pretrain.telemetry.watched import Watched, look

DONE = 0
_NAMES = {
    "data": "data",
    "compute": "compute",
    "optimizer": "optimizer",
    "offload": "exposed copies",
    "ep": "exposed ep",
    "pp": "exposed pp",
    "dp": "exposed dp",
    "world": "exposed all ranks",
}
_UNITS = {
    "power_watts": ("GPU power", "W", 1.0),
    "temperature_celsius": ("GPU temperature", "°C", 1.0),
    "sm_clock_hertz": ("GPU clock", "MHz", 1e6),
}


def main(argv: Sequence[str]) -> int:
    """Show the run that ``argv`` names until it has ended or Ctrl-C; returns the exit code.

    Raises:
        ConfigError: flags, or a directory that is no run's.
    """
    parser = _Parser(
        "kimi-pretrain top",
        description="A run at a glance: progress, what a step's time goes to, which ranks are "
        "slow, which GPUs are unwell. Reads the run directory only, from any host that sees it.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run_dir of a run")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds (2)")
    parser.given = " ".join(argv)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # argparse has shown the help
        return DONE
    if not arguments.interval > 0:
        raise ConfigError("--interval", arguments.interval, "seconds above zero", "--interval 2")
    console = Console(highlight=False)
    watched = look(arguments.run, time.time())
    if arguments.once or not console.is_terminal:
        console.print(frame(watched))
        return DONE
    with Live(frame(watched), console=console, auto_refresh=False) as live:
        try:
            while not watched.ended:
                time.sleep(arguments.interval)
                watched = look(arguments.run, time.time())
                live.update(frame(watched), refresh=True)
        except KeyboardInterrupt:
            pass
    return DONE


def frame(run: Watched) -> RenderableType:
    """One look at a run: alarms first, then progress, then where its time goes."""
    parts: list[RenderableType] = [
        _head(run),
        *(Text(alarm, style="bold red") for alarm in alarms(run)),
    ]
    if run.steps:
        parts += [_figures(run), Text(), _parts(run)]
    if run.ranks is not None and len(run.ranks["slowest"]) > 1:
        parts += [Text(), _slowest(run.ranks)]
    if run.ranks is not None and run.ranks.get("devices"):
        parts += [Text(), _devices(run.ranks["devices"])]
    return Group(*parts)


def alarms(run: Watched) -> Iterator[str]:
    """What wants somebody's attention, most urgent first."""
    if run.late:
        usual = median(row["step_seconds"] for row in run.steps)
        yield (
            f"no step for {duration(run.age)}, where one takes {decimal(usual, 2)} s: "
            "it hangs, or has stopped"
        )
    for each in (run.ranks or {}).get("unhealthy", []):
        yield f"GPU of rank {each['rank']} on {_text(each['host'])}: {', '.join(each['why'])}"
    if run.ranks is not None and run.ranks["straggler_ratio"] >= SLOW:
        worst = run.ranks["slowest"][0]
        yield (
            f"rank {worst['rank']} on {_text(worst['host'])} takes {worst['ratio']:.2f} x what "
            f"its stage's median does, most in {worst['part']}"
        )


def _head(run: Watched) -> Text:
    state, style = ("ended", "green") if run.ended else ("running", "cyan")
    if not run.steps:
        state, style = "before its first step", "yellow"
    if run.late:
        state, style = "late", "bold red"
    starts = len(run.launches)
    ranks = run.launches[-1]["ranks"] if run.launches else 1
    return Text.assemble(
        (state, style),
        f"  {_text(run.model)}, {_counted(ranks, 'rank')}, {_counted(starts, 'start')}  ",
        (str(run.directory), "dim"),
    )


def _figures(run: Watched) -> RenderableType:
    row, pace = run.steps[-1], Pace()
    for step in run.steps:
        pace.step(step["step_seconds"])
    total = run.total_steps or row["step"]
    remaining = pace.remaining(total - row["step"])
    figures = {
        "loss": decimal(row["loss"], 4),
        "tokens/s": count(row["tokens_per_second"]),
        "step": f"{row['step_seconds']:.3g} s",
        "MFU": percent(row.get("mfu")),
        "goodput": percent(row.get("goodput")),
        "ETA": "-" if remaining is None else duration(remaining),
    }
    if run.evaluation is not None:
        figures["held-out loss"] = decimal(run.evaluation["heldout_loss"], 4)
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_row(
        Text(progress(row["step"], total), style="bold"),
        ProgressBar(total=max(1, total), completed=row["step"], width=24),
    )
    values = Text("  ").join(
        Text.assemble((f"{label} ", "dim"), value) for label, value in figures.items()
    )
    return Group(line, values)


def _parts(run: Watched) -> Table:
    """Of the last step on rank 0, and over ranks as they were last compared."""
    row = run.steps[-1]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("a step's seconds")
    titles = ("rank 0", "share")
    ranks = run.ranks if run.ranks is not None and len(run.ranks["slowest"]) > 1 else None
    for title in titles if ranks is None else (*titles, "least", "median", "most"):
        table.add_column(title, justify="right")
    for part in PARTS:
        seconds = row.get(f"{part}_seconds", 0.0)
        cells = [_NAMES[part], f"{seconds:.4f}", percent(seconds / row["step_seconds"])]
        if ranks is not None:
            cells += [f"{ranks['parts'][part][key]:.4f}" for key in ("min", "median", "max")]
        table.add_row(*cells)
    table.add_row("whole", f"{row['step_seconds']:.4f}", "", style="bold")
    if row.get("checkpoint_seconds"):
        table.add_row("checkpoint before it", f"{row['checkpoint_seconds']:.4f}")
    return table


def _slowest(ranks: dict[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("slowest beside their stage", "host", "stage", "own s", "x median", "most in"):
        table.add_column(title)
    for each in ranks["slowest"]:
        table.add_row(
            f"rank {each['rank']}",
            _text(each["host"]),
            str(each["stage"]),
            f"{each['own_seconds']:.4f}",
            f"{each['ratio']:.2f}",
            each["part"],
            style="red" if each["ratio"] >= SLOW else "",
        )
    least = ranks["least_waiting"]
    caption = f"rank {least['rank']} on {_text(least['host'])} waits least for others: "
    return Group(table, Text(f"{caption}{least['wait_seconds']:.4f} s a step"))


def _devices(devices: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("over ranks", "least", "median", "most"):
        table.add_column(title)
    for name, spread in devices.items():
        label, unit, scale = _UNITS[name]
        cells = [f"{spread[key] / scale:.0f} {unit}" for key in ("min", "median", "max")]
        table.add_row(label, *cells)
    return table


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _text(value: object) -> str:
    return printable(str(value))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags that were ``given``."""

    given = ""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("top", self.given, message, f"{self.prog} --help")
