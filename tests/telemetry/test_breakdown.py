"""Ranks side by side, from made-up step times."""

from kimi_pretrain.telemetry.breakdown import PARTS, Seat, comparison


def times(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | seconds


def test_a_rank_is_held_against_its_stage_and_not_against_others() -> None:
    """Catches the last stage, which has the head, named as slow; and its waiting peer."""
    seats = [Seat(f"node-{rank // 2}", stage=rank // 4) for rank in range(8)]
    first = [times(compute=1.0, pp=2.0)] * 3 + [times(compute=1.25, pp=1.75)]
    last = [times(compute=3.0)] * 4
    row = comparison([*first, *last], seats)
    assert row["straggler"] == 3
    assert row["straggler_ratio"] == 1.25
    assert row["slowest"][0]["host"] == "node-1"
    assert [each["ratio"] for each in row["slowest"]] == [1.25, 1.0, 1.0]


def test_the_part_that_a_rank_is_slow_in_is_named() -> None:
    """Catches a rank with a slow disk taken for one with a slow device."""
    seats = [Seat("a", 0)] * 3
    ranks = [times(compute=1.0, data=0.1)] * 2 + [times(compute=1.0, data=0.6)]
    (worst, *_) = comparison(ranks, seats)["slowest"]
    assert (worst["rank"], worst["part"]) == (2, "data")


def test_of_two_ranks_the_slower_one_is_held_against_the_quicker() -> None:
    """Catches a median of two, which halves how slow a rank looks."""
    row = comparison([times(compute=1.0), times(compute=2.0)], [Seat("a", 0), Seat("b", 0)])
    assert (row["straggler"], row["straggler_ratio"]) == (1, 2.0)


def test_where_each_stage_is_one_rank_only_waiting_tells() -> None:
    """Catches a pipeline without replicas in which nobody is ever named."""
    seats = [Seat("a", 0), Seat("b", 1), Seat("c", 2)]
    ranks = [times(compute=1.0, pp=2.0), times(compute=3.0), times(compute=1.0, world=2.0)]
    row = comparison(ranks, seats)
    assert row["straggler_ratio"] == 1.0
    assert (row["least_waiting"]["rank"], row["least_waiting"]["host"]) == (1, "b")


def test_a_part_is_told_as_its_spread_over_ranks() -> None:
    """Catches rank 0's share told as everyone's."""
    row = comparison([times(ep=0.5), times(ep=0.1), times(ep=0.2)], [Seat("a", 0)] * 3)
    assert row["parts"]["ep"] == {"min": 0.1, "median": 0.2, "max": 0.5}


def test_thousands_of_ranks_are_compared_at_once() -> None:
    """Catches work that grows with the square of the ranks of a stage."""
    from time import process_time

    ranks = [times(compute=2.0 if rank == 4000 else 1.0) for rank in range(4096)]
    began = process_time()
    assert comparison(ranks, [Seat("a", rank % 16) for rank in range(4096)])["straggler"] == 4000
    assert process_time() - began < 1.0
