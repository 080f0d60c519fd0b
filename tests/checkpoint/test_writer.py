"""The background writers of several ranks."""

from pathlib import Path

import pytest
import torch

from kimi_pretrain.checkpoint.state import Snapshot, restore, snapshot
from kimi_pretrain.checkpoint.store import (
    checkpoint_step,
    list_checkpoints,
    verify,
)
from kimi_pretrain.checkpoint.writer import CheckpointWriter
from kimi_pretrain.parallel.errors import PeerError
from tests.checkpoint.held import Buffers, deal, even

WORLD = 3


def _snapshots(step: int) -> list[Snapshot]:
    tensors = {("master", "w"): torch.full((4, 5), float(step))}
    ranks = deal(tensors, even(tensors, WORLD), WORLD)
    model = Buffers(torch.zeros(2))
    return [snapshot(model, held, {"step": step}, r, WORLD) for r, held in enumerate(ranks)]  # type: ignore[arg-type]


def _writers(root: Path, deadline: float = 30.0) -> list[CheckpointWriter]:
    return [CheckpointWriter(root, 2, rank, WORLD, deadline) for rank in range(WORLD)]


def test_ranks_write_one_checkpoint_after_another(tmp_path: Path) -> None:
    """Catches a rank that prunes what others still write, and steps that mix."""
    writers = _writers(tmp_path)
    for step in (1, 2, 3):
        for writer, taken in zip(writers, _snapshots(step), strict=True):
            writer.save(step, taken)
    for writer in reversed(writers):  # rank 0 last: the others do not wait for it
        writer.close()
    found = list_checkpoints(tmp_path)
    assert [checkpoint_step(directory) for directory in found] == [3, 2]
    for directory in found:
        verify(directory)
        got = {("master", "w"): torch.zeros(4, 5)}
        (held,) = deal(got, even(got, 1), 1)
        restore(directory, Buffers(torch.ones(2)), held)  # type: ignore[arg-type]
        assert bool((got["master", "w"] == checkpoint_step(directory)).all())


def test_a_rank_without_its_part_stops_the_run(tmp_path: Path) -> None:
    """Catches a missing rank that nobody hears of until the run is resumed."""
    writers = _writers(tmp_path, deadline=0.1)
    taken = _snapshots(1)
    for rank in (0, 2):
        writers[rank].save(1, taken[rank])
    writers[2].close()
    with pytest.raises(PeerError, match=r"part: 1$"):
        writers[0].save(2, _snapshots(2)[0])
    writers[0].close()
    writers[1].close()
    assert list_checkpoints(tmp_path) == []


def test_abandoning_ends_the_wait(tmp_path: Path) -> None:
    """Catches a process that outlives its dead peer by the whole deadline."""
    writer = _writers(tmp_path, deadline=600.0)[0]
    writer.save(1, _snapshots(1)[0])
    writer.abandon()
    with pytest.raises(PeerError, match="given up"):
        writer.close()
