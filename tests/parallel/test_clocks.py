"""Clocks of ranks, aligned."""

from time import perf_counter, time

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.clocks import clock_offset, wall_clocks
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks

SKEWS = (7.0, -1000.0, 0.25)  # seconds that each rank's clock is ahead


def offset_as_rank(rank: int, world_size: int) -> float:
    everyone = open_world(ParallelConfig(dp=world_size, timeout_seconds=60.0)).everyone
    return clock_offset(everyone, lambda: perf_counter() + SKEWS[rank])


def test_skewed_clocks_agree_once_their_offsets_are_added() -> None:
    """Catches an offset of the wrong sign, of another rank, or that contains a round trip."""
    offsets = run_ranks(len(SKEWS), offset_as_rank)
    assert offsets[0] == 0.0
    for skew, offset in zip(SKEWS, offsets, strict=True):
        assert abs(skew + offset - SKEWS[0]) < 0.01


def test_one_rank_asks_nobody() -> None:
    """Catches a single process that waits for an answer."""
    assert clock_offset(Group("pp")) == 0.0


def wall_as_rank(rank: int, world_size: int) -> list[float]:
    everyone = open_world(ParallelConfig(dp=world_size, timeout_seconds=60.0)).everyone
    return wall_clocks(everyone, lambda: time() + SKEWS[rank])


def test_a_clock_that_is_off_shows_on_every_rank() -> None:
    """Catches a clock held against the first rank's, which may be the wrong one, and seconds
    since the epoch in single precision, which cannot tell minutes apart."""
    told = run_ranks(len(SKEWS), wall_as_rank)
    assert told[0] == told[1] == told[2]
    for skew, ahead in zip(SKEWS, told[0], strict=True):
        assert abs(ahead - (skew - sorted(SKEWS)[1])) < 0.1
