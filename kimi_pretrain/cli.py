"""The command line: one word chooses a command, which is imported only then."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from kimi_pretrain import __version__
from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.parallel.errors import PeerError, SharedConfigError

USAGE = """\
usage: kimi-pretrain COMMAND ...

  train     pretrain a model; without arguments: a nano model of the Kimi K2 family, in minutes
  launch    start the ranks of a run here, as a Slurm job, or by ssh on the hosts of a file
  data      prepare, verify and inspect tokenized corpora
  plan      say what a run will need: layout, bytes and work of every rank
  doctor    say whether this machine, or every rank of a job, is fit for a run
  ckpt      list, verify and export the checkpoints of a run
  report    write a page with plots of a run
  top       watch a run in the terminal: its figures, what its time goes to, who is slow
  trace     draw a pipeline schedule, or a run's step beside it, in time

kimi-pretrain COMMAND --help says more; docs/configuration.md lists what can be set.
Completion: eval "$(kimi-pretrain train --shell-completion install=bash)"
"""

_OF_RANKS = ("train", "doctor")

# Seconds that other ranks leave to rank 0: where all fail at once, and where each in its time.
SHARED_TURN, OWN_TURN = 1.0, 5.0


def main(argv: list[str] | None = None) -> int:
    """Run ``argv`` (default: the process's); returns the exit code of docs/exit-codes.md."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return exit_codes.BAD_INPUT
    word, rest = arguments[0], arguments[1:]
    if word in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if word == "--version":
        print(f"kimi_pretrain {__version__}")
        return 0
    try:
        if word in ("-sc", "--shell-completion"):
            return _completion(rest)
        if word not in _COMMANDS:
            rule = f"the commands are {', '.join(_COMMANDS)}"
            raise ConfigError("command", word, rule, nearest_name(word, _COMMANDS))
        return _COMMANDS[word](rest)
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, PeerError) as error:
        _say(error, of_ranks=word in _OF_RANKS)
        return exit_codes.PEER if isinstance(error, PeerError) else exit_codes.BAD_INPUT


def _say(error: ConfigError | PeerError, of_ranks: bool) -> None:
    """One line for all ranks: rank 0's.

    ``of_ranks``: the command is one whose processes meet.

    A rank that is refused before it met the others tells them, and leaves the line to rank 0.
    The others give rank 0 time to speak, since a launcher ends all ranks once one of them has
    ended. Where they are still there then, and their trouble is their own, they speak too.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"kimi-pretrain: {error}", file=sys.stderr, flush=True)
    shared = error.shared if isinstance(error, PeerError) else isinstance(error, SharedConfigError)
    if of_ranks and isinstance(error, ConfigError) and not shared:
        shared = _told_the_others(error)
    if rank != "0":
        time.sleep(SHARED_TURN if shared else OWN_TURN)
        if not shared:
            print(f"kimi-pretrain: rank {rank}: {error}", file=sys.stderr, flush=True)


def _told_the_others(error: ConfigError) -> bool:
    """Whether this process is one of several ranks and rank 0 speaks for them."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not os.environ.get("MASTER_ADDR"):
        return False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from kimi_pretrain.parallel.rendezvous import Place, refuse  # torch

    try:
        place = Place.of_environment()
    except ConfigError:
        return False
    return refuse(place, error)


def _command(module: str) -> Callable[..., int]:
    """The ``main`` of a module, of ``argv`` or what else it takes, imported when it is called."""

    def run(*arguments: object) -> int:
        return int(import_module(module).main(*arguments))

    return run


def _train(arguments: list[str]) -> int:
    from kimi_pretrain.launch.command import start
    from kimi_pretrain.train.command import main as train

    return train(arguments, start)


def _launch(arguments: list[str]) -> int:
    from kimi_pretrain.launch.command import USAGE as USAGE_OF_LAUNCH
    from kimi_pretrain.launch.command import parse, start
    from kimi_pretrain.train.command import main as train

    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE_OF_LAUNCH, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else exit_codes.BAD_INPUT
    asked = parse(arguments)
    begin = partial(start, launcher=asked.launcher, dry_run=asked.dry_run)
    return train(asked.overrides, begin)


def _plan(arguments: list[str]) -> int:
    from kimi_pretrain.plan.commands import main as plan

    return plan(arguments, _command("kimi_pretrain.dry_run.commands"))


def _doctor(arguments: list[str]) -> int:
    from kimi_pretrain.doctor.commands import main as doctor
    from kimi_pretrain.launch.local import launch

    return doctor(arguments, partial(launch, "kimi_pretrain.doctor"))


def _report(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]) or len(arguments) != 1:
        print("usage: kimi-pretrain report RUN_DIR", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else exit_codes.BAD_INPUT
    run_dir = Path(arguments[0])
    if not (run_dir / "metrics.jsonl").is_file():
        rule = "a run directory holds metrics.jsonl"
        raise ConfigError("report", str(run_dir), rule, "the run_dir that training printed")
    from kimi_pretrain.telemetry.report import write_report  # matplotlib

    print(write_report(run_dir))
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "launch": _launch,
    "data": _command("kimi_pretrain.data.commands"),
    "plan": _plan,
    "doctor": _doctor,
    "ckpt": _command("kimi_pretrain.checkpoint.commands"),
    "report": _report,
    "top": _command("kimi_pretrain.telemetry.top"),
    "trace": _command("kimi_pretrain.telemetry.commands"),
}


def _completion(arguments: list[str]) -> int:
    """Hydra's completion scripts call the program without its first word; here it is put back.

    The shell's line is in COMP_LINE. The first word completes to a command; what follows
    ``train`` is Hydra's; for the rest the shell completes file names.
    """
    line = os.environ.get("COMP_LINE", "")
    program, _, typed = line.lstrip().partition(" ")
    command, space, rest = typed.lstrip().partition(" ")
    asks = any(argument.startswith("query=") for argument in arguments)
    if asks and not space:
        print(" ".join(_COMMANDS))
        return 0
    if asks and command != "train":
        return 0
    os.environ["COMP_LINE"] = f"{program} {rest}"
    return _COMMANDS["train"](["--shell-completion", *arguments])
