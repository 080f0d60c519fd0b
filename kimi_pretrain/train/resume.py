"""Going on from a run directory's newest checkpoint that is whole, on all ranks together."""

from pathlib import Path
from typing import Any

from kimi_pretrain.checkpoint.state import load
from kimi_pretrain.checkpoint.store import (
    CheckpointError,
    checkpoint_step,
    list_checkpoints,
    remove_unfinished,
    verify_share,
)
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import require_same_run
from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.world import World
from kimi_pretrain.telemetry.console import Console
from kimi_pretrain.train.step import TrainStep
from kimi_pretrain.train.together import together

CONFIG = "config.yaml"


def restore_latest(config: Config, directory: Path, train_step: TrainStep, console: Console) -> int:
    """Load the newest checkpoint that verifies; the number of steps that are done.

    Its number of ranks need not be this run's.

    Raises:
        ConfigError: on every rank, when the directory holds another run, or checkpoints that
            cannot be used.
    """
    world = train_step.world
    found = _as_first(world, together(world, lambda: _candidates(config, directory, world)))
    latest = _newest_whole(found, world, console)
    if latest is None:
        if found:
            raise ConfigError(
                "run_dir",
                config.run_dir,
                f"none of its {len(found)} checkpoints verifies and a resume must not start over",
                "another run_dir, or a copy of the checkpoints that is whole",
            )
        return 0
    state = together(world, lambda: _load(config, directory, latest, train_step))
    train_step.optimizer.publish()
    console.note(f"resumed from {latest} ({state['tokens']:,} tokens)")
    return int(state["step"])


def _candidates(config: Config, directory: Path, world: World) -> list[Path]:
    """Committed checkpoints, newest first, if the run may go on from them."""
    root = directory / "checkpoints"
    if world.is_first:
        remove_unfinished(root)
    world.everyone.barrier()
    found = list_checkpoints(root)
    if not found:
        if (directory / "summary.json").exists():
            raise ConfigError(
                "run_dir",
                config.run_dir,
                "it holds a finished run whose checkpoints are gone, and starting over would "
                "replace its record",
                "another run_dir",
            )
        return []
    if not config.resume:
        raise ConfigError(
            "run_dir",
            config.run_dir,
            f"it holds checkpoints up to step {checkpoint_step(found[0])} and resume=false "
            "must not overwrite them",
            "another run_dir, or resume=true to go on",
        )
    require_same_run(config, directory / CONFIG)
    return found


def _as_first(world: World, found: list[Path]) -> list[Path]:
    """What rank 0 found, on every rank: a shared file system may list a directory late."""
    (first, *_) = world.everyone.gather_texts("\n".join(map(str, found)) if world.is_first else "")
    return [Path(line) for line in first.splitlines()]


def _newest_whole(found: list[Path], world: World, console: Console) -> Path | None:
    """Every rank verifies its share of a checkpoint's files; all must be whole."""
    for directory in found:
        failure = ""
        try:
            verify_share(directory, world.rank, world.size)
        except CheckpointError as error:
            failure = str(error)
        failures = [text for text in world.everyone.gather_texts(failure) if text]
        if not failures:
            return directory
        console.note(f"skipped a checkpoint: {failures[0]}")
    return None


def _load(config: Config, directory: Path, latest: Path, train_step: TrainStep) -> dict[str, Any]:
    try:
        state = load(latest, train_step.model, train_step.optimizer)
    except CheckpointError as error:
        raise ConfigError(
            "checkpoint", str(latest), str(error), "the configuration it was written with"
        ) from error
    dtype = str(train_step.model.dtype)
    if state["dtype"] != dtype:
        raise ConfigError(
            "precision",
            config.precision,
            f"it means {dtype} on this machine and the checkpoints of {directory} were trained "
            f"in {state['dtype']}",
            "precision=bf16, fp32 or fp64, as the run was started",
        )
    return state
