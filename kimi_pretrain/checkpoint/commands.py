"""`kimi-pretrain ckpt list | verify | export`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from kimi_pretrain.checkpoint.store import (
    CheckpointError,
    checkpoint_step,
    is_checkpoint,
    list_checkpoints,
    ranks,
    read_manifest,
    verify,
)
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import read_saved
from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.config.typed import build
from kimi_pretrain.config.validate import validate_model

DONE, BAD_INPUT = 0, 2
CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"  # of a run directory
_DTYPES = ("bf16", "fp32")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, self.format_usage().strip(), f"{self.prog} --help")


def main(argv: Sequence[str]) -> int:
    """Run one checkpoint command; returns the exit code, 2 if a verified checkpoint is damaged.

    Raises:
        ConfigError: arguments, a directory or a checkpoint that cannot be used.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit:  # argparse has shown the help
        return DONE
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except OSError as error:
        rule = "it must be readable, and the target writable"
        raise ConfigError(
            error.filename or "input or output", error.strerror or str(error), rule, "another path"
        ) from error


def _list(arguments: argparse.Namespace) -> int:
    found = _checkpoints(arguments.path)
    print(f"{'step':>12} {'ranks':>6} {'bytes':>20}  verified")
    for directory in found:
        damage = _damage(directory)
        try:
            files = read_manifest(directory)
            size = f"{sum(file['bytes'] for file in files.values()):,}"
            counts = f"{ranks(files):>6} {size:>20}"
        except CheckpointError:
            counts = f"{'?':>6} {'?':>20}"
        print(f"{checkpoint_step(directory):>12,} {counts}  {'no: ' + damage if damage else 'yes'}")
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    code = DONE
    for directory in _checkpoints(arguments.path):
        damage = _damage(directory)
        if damage:
            print(f"kimi-pretrain: damaged: {damage}", file=sys.stderr)
            code = BAD_INPUT
        else:
            print(f"{directory}: whole, {len(read_manifest(directory))} files")
    return code


def _export(arguments: argparse.Namespace) -> int:
    target: Path = arguments.directory
    if arguments.dtype not in (None, *_DTYPES):
        rule = f"an export is written in {' or '.join(_DTYPES)}"
        raise ConfigError("--dtype", arguments.dtype, rule, f"--dtype {_DTYPES[0]}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule = "an export never overwrites what is there"
        raise ConfigError("DIRECTORY", str(target), rule, "a directory that is new or empty")
    checkpoint = _newest_whole(arguments.path)
    cfg = _model(checkpoint)

    from kimi_pretrain.checkpoint.export import export  # torch
    from kimi_pretrain.ops.precision import resolve

    dtype = None if arguments.dtype is None else resolve(arguments.dtype)
    try:
        written = export(checkpoint, cfg, target, dtype)
    except CheckpointError as error:
        rule = f"it must hold the model of {CONFIG}: {error}"
        raise ConfigError(
            "checkpoint", str(checkpoint), rule, "the run directory it was written in"
        ) from error
    print(f"{target}: {cfg.name} after step {checkpoint_step(checkpoint):,}, {written}")
    return DONE


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint at `path`, or every one of the run at `path`, newest first."""
    if is_checkpoint(path):
        return [path]
    found = list_checkpoints(path / CHECKPOINTS)
    if not found:
        rule = f"a run directory holds {CHECKPOINTS}/step-00000100 and the like"
        raise ConfigError("run", str(path), rule, "the run_dir that training printed")
    return found


def _newest_whole(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run at `path` that verifies."""
    damages: list[str] = []
    for directory in _checkpoints(path):
        damage = _damage(directory)
        if damage is None:
            for skipped in damages:
                print(f"skipped a checkpoint: {skipped}", file=sys.stderr)
            return directory
        damages.append(damage)
    rule = f"none of the {len(damages)} checkpoints there verifies: {damages[0]}"
    raise ConfigError("checkpoint", str(path), rule, "one that `ckpt list` shows as verified")


def _damage(directory: Path) -> str | None:
    """What verification says against a checkpoint; None if it is whole."""
    try:
        verify(directory)
    except CheckpointError as error:
        return str(error)
    return None


def _model(checkpoint: Path) -> ModelConfig:
    """The model of the run that a checkpoint lies in."""
    path = checkpoint.resolve().parents[1] / CONFIG
    if not path.is_file():
        rule = "the configuration beside a run's checkpoints says which model they are"
        raise ConfigError(str(path), "missing", rule, "the run directory they were written in")
    cfg: ModelConfig = build(ModelConfig, read_saved(path).get("model"), "model")
    validate_model(cfg)
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "kimi-pretrain ckpt",
        description="List, verify and export the checkpoints of a run.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="list|verify|export")
    listing = commands.add_parser(
        "list", help="step, ranks that wrote it, bytes, and whether every hash is right"
    )
    listing.add_argument("path", type=Path, metavar="RUN")
    listing.set_defaults(run=_list)
    check = commands.add_parser("verify", help="check every file; exit code 2 after any damage")
    check.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    check.set_defaults(run=_verify)
    out = commands.add_parser("export", help="write a Hugging Face checkpoint, from any layout")
    out.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run directory, whose newest whole checkpoint is taken, or one step of it",
    )
    out.add_argument("directory", type=Path, metavar="DIRECTORY", help="new or empty")
    out.add_argument(
        "--dtype", metavar="|".join(_DTYPES), help="of the weights (what the run computed in)"
    )
    out.set_defaults(run=_export)
    return parser
