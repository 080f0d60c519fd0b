"""`kimi-pretrain trace`: a schedule, or a run's step beside its schedule, in time."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases
from kimi_pretrain.pipeline.errors import MicrobatchError
from kimi_pretrain.pipeline.schedules import GENERATORS, generate
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import Timeline, read_rows
from kimi_pretrain.pipeline.verify import verify
from kimi_pretrain.telemetry.measured_costs import measured_costs, measured_schedule
from kimi_pretrain.telemetry.trace import write_chrome_trace
from kimi_pretrain.telemetry.trace_table import trace_lines

DONE = 0
_MILLISECOND = 1e-3
# Milliseconds of one layer where nothing is said: round numbers in the proportions of Kimi K2.
_COSTS = {
    "forward": (3.0, 2.5, 7.0, 2.5),
    "backward": (4.0, 2.5, 7.0, 2.5),
    "weight": (2.0, 7.0),
    "first": (0.0, 0.0, 0.0),
    "last": (0.0, 0.0, 0.0),
    "p2p": (1.0,),
    "offload": (0.0,),
    "prefetch": (0.0,),
    "recompute": (0.0,),
}
_PARTS = {
    "forward": "ATTEND,DISPATCH,EXPERT,COMBINE",
    "backward": "ATTEND,DISPATCH,EXPERT,COMBINE",
    "weight": "ATTEND,EXPERT",
    "first": "FORWARD,BACKWARD,WEIGHT",
    "last": "FORWARD,BACKWARD,WEIGHT",
    "p2p": "MS",
    "offload": "MS",
    "prefetch": "MS",
    "recompute": "MS",
}
_HELP = {
    "forward": "a layer forwards, by phase; dispatch and combine are its all-to-all",
    "backward": "a layer backwards, gradient of the input alone",
    "weight": "a layer's weight gradients",
    "first": "what the first stage has beside its layers: the embedding",
    "last": "what the last stage has beside its layers: head and loss",
    "p2p": "a message between two ranks",
    "offload": "the copy of a layer's activations from the device",
    "prefetch": "and back",
    "recompute": "a layer computed again, where a RECOMPUTE stands",
}


def main(argv: Sequence[str]) -> int:
    """Draws what ``argv`` names; returns the exit code.

    Raises:
        ConfigError: flags, a schedule, costs or a run that cannot be drawn.
    """
    parser = _parser()
    parser.given = " ".join(argv)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # argparse has shown the help
        return DONE
    timelines = _timelines(arguments)
    chrome, figure = _write(timelines, _directory(arguments))
    for timeline in timelines:
        print("\n".join(trace_lines(timeline)), end="\n\n")
    print(f"{chrome} (open it in ui.perfetto.dev)\n{figure}")
    return DONE


def _write(timelines: Sequence[Timeline], directory: Path) -> tuple[Path, Path]:
    """The trace and the figure."""
    from kimi_pretrain.telemetry.trace_plot import draw_trace  # matplotlib

    chrome, figure = directory / "trace.json", directory / "trace.png"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_chrome_trace(timelines, chrome)
        draw_trace(timelines, figure)
    except OSError as error:
        rule = f"a directory to write to ({error.strerror})"
        raise ConfigError("--output", str(directory), rule, "--output trace") from None
    return chrome, figure


def _timelines(arguments: argparse.Namespace) -> list[Timeline]:
    named = [arguments.run, arguments.schedule, arguments.text]
    if sum(name is not None for name in named) != 1:
        rule = "one of RUN, --schedule and --text says what to draw"
        fix = "--schedule k2 --pp 4 --vpp 2 --microbatches 8"
        raise ConfigError("trace", [name for name in named if name is not None], rule, fix)
    if arguments.run is not None:
        return _run_timelines(arguments)
    schedule = _schedule(arguments)
    return [simulate(schedule, _costs(arguments, _layers(arguments, schedule.stages)))]


def _run_timelines(arguments: argparse.Namespace) -> list[Timeline]:
    """The planned step and the measured one."""
    measured = read_rows(arguments.run / "trace")
    schedule = measured_schedule(measured)
    costs = measured_costs(measured)
    if any(getattr(arguments, name) is not None for name in _COSTS):
        costs = _costs(arguments, costs.layers)
    return [simulate(schedule, costs), measured]


def _schedule(arguments: argparse.Namespace) -> Schedule:
    shape = {"--pp": arguments.pp, "--microbatches": arguments.microbatches}
    if arguments.text is not None:
        try:
            rows = arguments.text.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            rule = f"a text file with one row a rank ({error})"
            fix = "rows such as 0F0,0B0"
            raise ConfigError("--text", str(arguments.text), rule, fix) from None
        schedule = Schedule.from_text([row for row in rows if row.strip()], arguments.text.stem)
        verify(schedule)
        return schedule
    for flag, value in shape.items():
        if value is None:
            raise ConfigError(flag, value, f"--schedule {arguments.schedule} needs it", f"{flag} 8")
    try:
        return generate(arguments.schedule, arguments.pp, arguments.vpp, arguments.microbatches)
    except MicrobatchError as error:
        fix = f"--microbatches {error.needed}"
        raise ConfigError("--microbatches", error.value, error.rule, fix) from error


def _layers(arguments: argparse.Namespace, stages: int) -> tuple[int, ...]:
    """[stages] layers: one number for all stages, or one for each."""
    text = arguments.layers
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) not in (1, stages):
        rule = f"layers of a stage, or of each of the {stages} stages, with commas"
        raise ConfigError("--layers", text, rule, "--layers 1")
    layers = tuple(map(int, parts))
    return layers if len(layers) == stages else layers * stages


def _costs(arguments: argparse.Namespace, layers: tuple[int, ...]) -> Costs:
    forward, backward, weight, first, last, p2p, offload, prefetch, again = (
        [part * _MILLISECOND for part in _milliseconds(name, getattr(arguments, name))]
        for name in _COSTS
    )
    return Costs(
        layers,
        Phases(*forward),
        Phases(*backward),
        Phases(attend=weight[0], expert=weight[1]),
        Extra(*first),
        Extra(*last),
        *p2p,
        *offload,
        *prefetch,
        *again,
    )


def _milliseconds(name: str, text: str | None) -> tuple[float, ...]:
    default = _COSTS[name]
    if text is None:
        return default
    fix = f"--{name} {','.join(f'{part:g}' for part in default)}"
    try:
        parts = tuple(map(float, text.split(",")))
    except ValueError:
        parts = ()
    if len(parts) != len(default):
        raise ConfigError(f"--{name}", text, f"milliseconds: {_PARTS[name]}", fix)
    return parts


def _directory(arguments: argparse.Namespace) -> Path:
    if arguments.output is not None:
        return Path(arguments.output)
    return Path(arguments.run / "trace" if arguments.run is not None else "trace")


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags that were ``given``."""

    given = ""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("trace", self.given, message, f"{self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        "kimi-pretrain trace",
        description="The step of a pipeline on every rank in time: a schedule as it is planned, "
        "or a traced run beside its plan. Writes trace.json for Perfetto and trace.png.",
        epilog="kimi-pretrain trace --schedule k2 --pp 4 --vpp 2 --microbatches 8",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a traced run's run_dir")
    parser.add_argument("--schedule", metavar="NAME", help=f"one of {', '.join(GENERATORS)}")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a schedule, one row a rank")
    parser.add_argument("--pp", type=int, metavar="N", help="ranks of the pipeline")
    parser.add_argument("--vpp", type=int, default=1, metavar="N", help="stages a rank (1)")
    parser.add_argument("--microbatches", type=int, metavar="N")
    parser.add_argument("--output", metavar="DIR", help="where to write (trace, or RUN/trace)")
    costs = parser.add_argument_group(
        "costs", "milliseconds for one microbatch; for a run without any: as measured"
    )
    costs.add_argument("--layers", default="1", metavar="N,..", help="of a stage, or of each (1)")
    for name, default in _COSTS.items():
        shown = ",".join(f"{part:g}" for part in default)
        costs.add_argument(f"--{name}", metavar=_PARTS[name], help=f"{_HELP[name]} ({shown})")
    return parser
