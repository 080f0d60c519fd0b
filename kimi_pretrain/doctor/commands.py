"""`kimi-pretrain doctor`: is this machine, or every rank of this job, fit for a run?"""

import argparse
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from kimi_pretrain.config import compose, exit_codes
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config, ParallelConfig

_MOST_HERE = 64
Launch = Callable[[list[str], int], int]  # command line and number of ranks -> exit code


def main(argv: Sequence[str], launch: Launch) -> int:
    """Examine what ``argv`` names; returns the exit code, 3 where something is not fit.

    Args:
        argv: flags, and overrides as for train.
        launch: starts as many ranks, each with the command line that it is given.

    Raises:
        ConfigError: flags, overrides, or a number of ranks that does not fit them.
        PeerError: a rank of the job did not come or failed.
    """
    parser = _parser()
    parser.given = " ".join(argv)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # argparse has shown the help
        return exit_codes.DONE
    config = compose(arguments.overrides)
    ranks = config.parallel.pp * config.parallel.dp
    if ranks > 1 and "RANK" not in os.environ:
        _require_startable(ranks)
        return launch(list(argv), ranks)
    return _examine(config, arguments)


def _examine(config: Config, arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from kimi_pretrain.doctor.examine import examine  # torch
    from kimi_pretrain.doctor.report import bug_report, json_text, text
    from kimi_pretrain.parallel.world import open_world

    with closing(open_world(_as_started(config.parallel))) as world:
        if world.is_first and arguments.report is not None:
            _write(arguments.report, "")  # before minutes of probes
        found = examine(config, world, socket.gethostname())
        if world.is_first:
            print(json_text(found) if arguments.json else text(found), flush=True)
            if arguments.report is not None:
                _write(arguments.report, bug_report(found, arguments.overrides))
        # The first rank to leave with a code makes torchrun end the others: leave together.
        world.everyone.barrier()
    return exit_codes.DONE if found.fit else exit_codes.GUARD


def _require_startable(ranks: int) -> None:
    """Ranks of a preset for thousands of GPUs are not to be started on the host it is typed on."""
    if ranks > _MOST_HERE:
        rule = f"doctor starts {_MOST_HERE} ranks at most, on this machine"
        fix = "torchrun ... -m kimi_pretrain.doctor with the same overrides on the job's nodes"
        raise ConfigError("parallel.pp x parallel.dp", ranks, rule, fix)


def _as_started(parallel: ParallelConfig) -> ParallelConfig:
    """The layout of the overrides, or of as many replicas as a launcher has started ranks.

    A job is often examined before anybody has decided what runs on it.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if parallel.pp * parallel.dp == 1 and world.isdecimal():
        return replace(parallel, dp=int(world))
    return parallel


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"it can be written ({error.strerror})"
        raise ConfigError("--report", str(path), rule, "--report doctor.txt") from error


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags that were ``given``."""

    given = ""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("doctor", self.given, message, f"{self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        "kimi-pretrain doctor",
        description="Whether a machine is fit for a run: versions, kernels, GPUs, links, disk, "
        "shared memory, limits, port. On a job also every rank's speed beside the others', "
        "and who is slow. Overrides are those of the run: where it writes, its cluster, its "
        "layout. Exits with 3 where something would spoil a run.",
        epilog="torchrun --nproc-per-node 8 ... -m kimi_pretrain.doctor cluster=h800",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", help="as for train: run_dir=DIR cluster=h800 ...")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--report", type=Path, metavar="FILE", help="one file to attach to a bug")
    return parser
