"""Which ranks write what of a step, and when."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.parallel.world import World, open_world
from kimi_pretrain.pipeline.execute import Executor
from kimi_pretrain.pipeline.timeline import read_rows
from kimi_pretrain.train.trace import traced


def executor() -> Executor:
    return cast(Executor, SimpleNamespace(observe=None))


def observe(of: Executor, *row: Any) -> None:
    assert of.observe is not None
    of.observe(*row)


def alone() -> World:
    return open_world(ParallelConfig())


def test_one_step_is_observed_and_written(tmp_path: Path) -> None:
    """Catches steps after the traced one that are observed too, and rows of an earlier trace."""
    (tmp_path / "rank-0003.jsonl").write_text("of an earlier run")
    of = executor()
    with traced(of, alone(), tmp_path):
        observe(of, "0F0", "compute", "0F0 attend", 2.0, 3.5)
    assert of.observe is None
    ((interval,),) = read_rows(tmp_path).ranks
    assert (interval.name, interval.start, interval.end) == ("0F0 attend", 0.0, 1.5)


def test_other_replicas_are_not_observed(tmp_path: Path) -> None:
    """Catches two replicas that write the same files."""
    of, world = executor(), alone()
    world.dp = Group("dp", (0, 1), 1, process_group=object())
    with traced(of, world, tmp_path / "trace"):
        assert of.observe is None
    assert not (tmp_path / "trace").exists()


def test_a_step_that_fails_is_not_written(tmp_path: Path) -> None:
    """Catches half a step that is drawn as a whole one."""
    of = executor()

    def fail() -> None:
        with traced(of, alone(), tmp_path):
            observe(of, "0F0", "compute", "0F0 attend", 2.0, 3.5)
            raise PeerError("rank 1 is gone")

    with pytest.raises(PeerError):
        fail()
    assert of.observe is None
    assert list(tmp_path.iterdir()) == []
