"""A step of a start that fails on one rank fails on all."""

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.together import together
from tests.distributed.ranks import run_ranks


def _fail(rank: int) -> int:
    if rank == 1:
        raise ConfigError("a file", ["x", 1], "it exists", "another")
    return rank


def start(rank: int, world_size: int) -> str:
    config = compose(["experiment=smoke", "run_dir=x", f"parallel.dp={world_size}"])
    world = open_world(config.parallel)
    assert together(world, lambda: rank) == rank
    with pytest.raises(ConfigError) as error:
        together(world, lambda: _fail(rank))
    return str(error.value)


def test_every_rank_raises_what_one_met() -> None:
    """Catches ranks that wait until their deadline for one that gave up."""
    first, second = run_ranks(2, start)
    assert "a file" in first
    assert "it exists; try another" in first
    assert "it exists; try another" in second
