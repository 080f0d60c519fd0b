"""Ranks that differ in a library or in a value are refused with one line, on all of them."""

from os import chdir
from pathlib import Path

import pytest
import torch

from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.ops.native import library
from kimi_pretrain.parallel.errors import SharedConfigError
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.pipeline.schedules import gpipe, interleaved_1f1b
from kimi_pretrain.train import agreement
from kimi_pretrain.train.agreement import agreed_run_dir, facts_of_run
from tests.distributed.ranks import run_ranks


def _agree(rank: int, size: int, odd: int, override: str, version: str | None) -> str:
    overrides = ["experiment=smoke", f"parallel.dp={size}", f"run_dir=runs/of-{rank}"]
    overrides.append("schedule.global_batch_size=12")
    if rank == odd:
        overrides.append(override)
        if version is not None:
            agreement.safetensors.__version__ = version
    return _meet(compose(overrides))


def _meet(config: Config) -> str:
    """The run directory that ranks agree on, or what they are told instead of meeting."""
    try:
        world = open_world(config.parallel, facts_of_run(config))
    except SharedConfigError as error:
        assert not torch.distributed.is_initialized()  # before the first collective
        return str(error)
    directory = agreed_run_dir(world, config)
    world.close()
    return directory


def test_equal_ranks_take_rank_0s_run_directory() -> None:
    """Catches run directories that differ by the second in which each rank composed its own."""
    assert run_ranks(3, _agree, -1, "", None) == ["runs/of-0"] * 3


def test_another_value_on_one_rank_is_named() -> None:
    """Catches one run with two seeds, which trains and is worth nothing."""
    lines = run_ranks(3, _agree, 1, "seed=7", None)
    assert len(set(lines)) == 1
    assert lines[0].startswith(
        "seed on rank 1: got '7'; every rank must have the same, and ranks 0, 2 have 0; try "
    )


def test_another_library_on_one_rank_is_named() -> None:
    """Catches checkpoints of one run written by two versions of safetensors."""
    lines = run_ranks(2, _agree, 1, "seed=0", "0.0.1")
    assert len(set(lines)) == 1
    assert lines[0].startswith("version of safetensors on rank 1: got '0.0.1'; ")


def _agree_on_kernels(rank: int, size: int) -> str:
    if rank == 1:
        library.LIBRARY = Path("/nowhere")
        library.missing.cache_clear()
    return _meet(compose(["experiment=smoke", f"parallel.dp={size}", "precision=fp32"]))


@pytest.mark.skipif(library.missing() is not None, reason="every rank lacks native kernels here")
def test_a_rank_without_the_library_is_named() -> None:
    """Catches ranks that round differently because one node's installation built no kernels."""
    lines = run_ranks(2, _agree_on_kernels)
    assert len(set(lines)) == 1
    assert lines[0].startswith("kernels in use on rank 1: got 'reference ")
    assert "\n" not in lines[0]


def test_one_process_agrees_with_itself() -> None:
    """Catches a single run that gathers from nobody."""
    assert _meet(compose(["experiment=smoke", "run_dir=runs/alone"])) == "runs/alone"


def _agree_on_a_schedule(rank: int, size: int) -> str:
    overrides = ["experiment=smoke", f"parallel.pp={size}", "schedule.micro_batch_size=1"]
    return _meet(compose([*overrides, f"parallel.schedule={('gpipe', '1f1b')[rank]}"]))


def test_another_schedule_is_named_by_its_key() -> None:
    """Catches a digest, which nobody can act on, where a key says what to change."""
    for line in run_ranks(2, _agree_on_a_schedule):
        assert line.startswith("parallel.schedule on rank 1: got '1f1b'; ")


def _agree_on_a_file(rank: int, size: int, folder: str) -> str:
    chdir(Path(folder) / str(rank))
    config = compose(
        [
            "experiment=smoke",
            "run_dir=runs/x",
            "schedule.micro_batch_size=1",
            f"parallel.pp={size}",
            "parallel.schedule_file=rows",
        ]
    )
    return _meet(config)


def test_another_schedule_in_a_file_of_the_same_name_is_named(tmp_path: Path) -> None:
    """Catches stages that wait for messages which another node's copy of the file never sends."""
    for rank, schedule in enumerate((gpipe(2, 1, 4), interleaved_1f1b(2, 1, 4))):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "rows").write_text("\n".join(schedule.to_text()))
    lines = run_ranks(2, _agree_on_a_file, str(tmp_path))
    assert len(set(lines)) == 1
    assert lines[0].startswith("digest of the schedule on rank 1: got ")
    assert "\n" not in lines[0]
