"""`kimi-pretrain plan`, `plan --dry-run`, `plan layout` and `plan search`."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.plan.html import plan_page
from kimi_pretrain.plan.layout_report import layout_report
from kimi_pretrain.plan.layout_table import layout_data, layout_lines
from kimi_pretrain.plan.report import plan_data, plan_lines, refusal
from kimi_pretrain.plan.run_plan import plan_run, token_budget
from kimi_pretrain.plan.search import SECONDS, search
from kimi_pretrain.plan.search_table import search_data, search_lines
from kimi_pretrain.plan.shortage import shortage

DONE, BAD_INPUT = 0, 2
_WORDS = ("layout", "search")
_RANKS = "0,1,last"
_OVERRIDES = "as for train: model=k2 parallel.ep=16 ..."
_UNITS = {"": 1.0, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}

# configuration, global ranks, JSON or text -> exit code
DryRun = Callable[[Config, Sequence[int], bool], int]


def main(argv: Sequence[str], dry_run: DryRun) -> int:
    """Run one plan command; returns the exit code, 2 for flags that do not exist.

    Args:
        argv: what follows the word ``plan``.
        dry_run: runs ranks of the program without memory; it needs torch, a plan does not.

    Raises:
        ConfigError: overrides that describe no run, or after its plan one that does not fit.
    """
    word = argv[0] if argv and argv[0] in _WORDS else None
    try:
        if word == "layout":
            return _layout(argv[1:])
        return _search(argv[1:]) if word == "search" else _plan(argv, dry_run)
    except _Usage as stop:
        return stop.code


class _Usage(Exception):
    """argparse has said what is wrong, or shown the help."""

    def __init__(self, code: int) -> None:
        self.code = code


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(argv)
    except SystemExit as error:
        raise _Usage(DONE if error.code in (None, 0) else BAD_INPUT) from None


def _parser(word: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"kimi-pretrain plan{word}", description=description, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", help=_OVERRIDES)
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    return parser


def _plan(argv: Sequence[str], dry_run: DryRun) -> int:
    parser = _parser(
        "",
        "What a run will need, before a GPU is rented: memory, bytes on the wire, time. "
        "`plan layout` says who holds what, `plan search` finds layouts.",
        "kimi-pretrain plan experiment=k2_1t_h800_2048 --html plan.html",
    )
    parser.add_argument("--html", metavar="FILE", help="a page with a picture of memory and time")
    parser.add_argument("--tokens", metavar="N", help="token budget, as in 15.5T; else the run's")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="instead, run a step of the program itself on some ranks, without memory or peers, "
        "and compare what it holds and sends with the plan",
    )
    parser.add_argument(
        "--ranks", metavar="LIST", help=f"which, with --dry-run (default {_RANKS}, as there are)"
    )
    arguments = _parse(parser, argv)
    config = compose(arguments.overrides)
    if arguments.dry_run:
        _require_plain(arguments)
        return dry_run(config, _ranks(arguments.ranks, config), arguments.json)
    if arguments.ranks is not None:
        raise ConfigError("--ranks", arguments.ranks, "it belongs to --dry-run", "--dry-run")
    budget = _budget(arguments.tokens, config)
    plan = plan_run(config)
    short = shortage(config, plan.memory)
    if arguments.html is not None:
        _write(Path(arguments.html), plan_page(plan, short, budget))
    if arguments.json:
        print(json.dumps(plan_data(plan, short, budget), indent=2))
    else:
        print("\n".join(plan_lines(plan, short, budget)))
    if short is not None:
        raise refusal(config, short)
    return DONE


def _layout(argv: Sequence[str]) -> int:
    parser = _parser(
        " layout",
        "The ZeRO-1 layout of MuonClip for any model and number of ranks: bytes held "
        "and sent, padding, owners, Newton-Schulz work and how even it is.",
        "kimi-pretrain plan layout model=k2 parallel.pp=16 parallel.ep=16 parallel.dp=128",
    )
    arguments = _parse(parser, argv)
    report = layout_report(compose(arguments.overrides))
    if arguments.json:
        print(json.dumps(layout_data(report), indent=2))
    else:
        print("\n".join(layout_lines(report)))
    return DONE


def _search(argv: Sequence[str]) -> int:
    parser = _parser(
        " search",
        "The fastest layouts of a number of GPUs that fit, and why the others do not. What is "
        "said of parallel.pp, vpp, ep, dp, schedule and layer_split is tried, not taken.",
        "kimi-pretrain plan search --gpus 2048 experiment=k2_1t_h800_2048",
    )
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--top", type=int, default=10, help="layouts shown (default 10)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"it may take (default {SECONDS:g})"
    )
    arguments = _parse(parser, argv)
    found = search(compose(arguments.overrides), arguments.gpus, arguments.top, arguments.seconds)
    if arguments.json:
        print(json.dumps(search_data(found), indent=2))
    else:
        print("\n".join(search_lines(found)))
    return DONE


def _require_plain(arguments: argparse.Namespace) -> None:
    for flag, value in (("--html", arguments.html), ("--tokens", arguments.tokens)):
        if value is not None:
            raise ConfigError(flag, value, "it belongs to a plan", "leaving --dry-run out")


def _ranks(text: str | None, config: Config) -> list[int]:
    """Global ranks; of the default those that the run has."""
    world = Topology.of_config(config.parallel).world
    names = (text or _RANKS).split(",")
    ranks = [world - 1 if n == "last" else int(n) if n.isdecimal() else world for n in names]
    if text is None:
        ranks = [rank for rank in ranks if rank < world]
    for name, rank in zip(names, ranks, strict=False):
        if rank >= world:
            rule = f"a rank is one of 0 to {world - 1}, or last"
            raise ConfigError("--ranks", name, rule, f"--ranks {_RANKS}")
    return list(dict.fromkeys(ranks))


def _budget(text: str | None, config: Config) -> float:
    if text is None:
        return float(token_budget(config))
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([MBGT]?)", text)
    budget = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if budget <= 0:
        rule = "a number of tokens above zero, with M, B or T"
        raise ConfigError("--tokens", text, rule, "--tokens 15.5T")
    return budget


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"it can be written ({error.strerror})"
        raise ConfigError("--html", str(path), rule, "--html plan.html") from error
