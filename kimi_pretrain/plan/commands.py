"""`kimi-pretrain plan layout`."""

import argparse
import json
from collections.abc import Sequence

from kimi_pretrain.config import compose
from kimi_pretrain.plan.layout_report import layout_report
from kimi_pretrain.plan.layout_table import layout_data, layout_lines

DONE, BAD_INPUT = 0, 2


def main(argv: Sequence[str]) -> int:
    """Run one plan command; returns the exit code, 2 for flags that do not exist.

    Raises:
        ConfigError: overrides that describe no run.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as error:  # argparse has said what is wrong, or shown the help
        return DONE if error.code in (None, 0) else BAD_INPUT
    report = layout_report(compose(arguments.overrides))
    if arguments.json:
        print(json.dumps(layout_data(report), indent=2))
    else:
        print("\n".join(layout_lines(report)))
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kimi-pretrain plan",
        description="What a run will need, before a GPU is rented.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="layout")
    layout = commands.add_parser(
        "layout",
        help="who holds and who orthogonalises which parameter",
        description="The ZeRO-1 layout of MuonClip for any model and number of ranks: bytes held "
        "and sent, padding, owners, Newton-Schulz work and how even it is.",
        epilog="kimi-pretrain plan layout model=k2 parallel.pp=16 parallel.ep=16 parallel.dp=128",
        allow_abbrev=False,
    )
    layout.add_argument("overrides", nargs="*", help="as for train: model=k2 parallel.ep=16 ...")
    layout.add_argument("--json", action="store_true", help="everything, for programs")
    return parser
