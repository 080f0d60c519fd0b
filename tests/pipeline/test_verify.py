"""verify: what it accepts, and what it must not."""

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline import verify
from kimi_pretrain.pipeline.actions import (
    BACKWARD,
    RECEIVES,
    Action,
    Kind,
    Node,
    Overlap,
    Schedule,
    leaves,
)
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p
from kimi_pretrain.pipeline.schedules import gpipe, interleaved_1f1b, k2, one_f_one_b
from tests.pipeline.schedule_cases import schedules


def _with_row(schedule: Schedule, rank: int, row: list[Node]) -> Schedule:
    rows = [*schedule.ranks[:rank], tuple(row), *schedule.ranks[rank + 1 :]]
    return replace(schedule, ranks=tuple(rows))


def _refused(schedule: Schedule, **options: Any) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        verify(schedule, **options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError)
    return caught.value


wholes = st.one_of(
    schedules(),
    schedules().map(insert_p2p),
    schedules().map(lambda s: insert_offload(insert_p2p(s))),
)


@settings(max_examples=80, deadline=None)
@given(wholes, st.data())
def test_a_node_dropped_or_doubled_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    """Catches a check that counts but does not compare, of any kind of node."""
    rank = data.draw(st.integers(0, schedule.pp - 1))
    row = list(schedule.ranks[rank])
    position = data.draw(st.integers(0, len(row) - 1))
    node = row[position]
    _refused(_with_row(schedule, rank, row[:position] + row[position + 1 :]))
    again = data.draw(st.integers(0, len(row)))
    error = _refused(_with_row(schedule, rank, [*row[:again], node, *row[again:]]))
    assert error.rank == rank
    assert error.position == (position + 1 if again <= position else again)
    assert "is at position" in str(error)


@settings(max_examples=60, deadline=None)
@given(wholes, st.data())
def test_a_backward_before_its_forward_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    """Catches actions swapped across what one needs of the other."""
    rank = data.draw(st.integers(0, schedule.pp - 1))
    row = list(schedule.ranks[rank])
    backwards = [i for i, node in enumerate(row) if leaves(node)[-1].kind in BACKWARD]
    late = data.draw(st.sampled_from(backwards))
    backward = leaves(row[late])[-1]
    forward = Action(Kind.F, backward.stage, backward.microbatch)
    early = next(i for i, node in enumerate(row) if forward in leaves(node))
    row[early], row[late] = row[late], row[early]
    _refused(_with_row(schedule, rank, row))


@settings(max_examples=60, deadline=None)
@given(schedules().map(insert_p2p), st.data())
def test_exchanged_receives_are_refused(schedule: Schedule, data: st.DataObject) -> None:
    """Catches two messages between the same ranks that would swap their contents."""
    placement = schedule.placement
    places = [
        (rank, i, j)
        for rank, row in enumerate(schedule.ranks)
        for i, j in _receive_pairs(row, placement)
    ]
    if not places:
        return
    rank, i, j = data.draw(st.sampled_from(places))
    row = list(schedule.ranks[rank])
    row[i], row[j] = row[j], row[i]
    error = _refused(_with_row(schedule, rank, row))
    assert (error.rank, error.position) == (rank, i)
    assert "both ends have the same order" in str(error)


def _receive_pairs(row: tuple[Node, ...], placement: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring receives of a row that come from the same rank."""
    last: dict[int, int] = {}
    pairs = []
    for position, node in enumerate(row):
        if isinstance(node, Action) and node.kind in RECEIVES:
            sender = placement[node.stage + (1 if node.kind is Kind.RECV_B else -1)]
            if sender in last:
                pairs.append((last[sender], position))
            last[sender] = position
    return pairs


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_a_pair_of_one_microbatch_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    """Catches a pair whose backward needs its own forward: it would wait for itself."""
    rank = data.draw(st.integers(0, schedule.pp - 1))
    row = [leaf for node in schedule.ranks[rank] for leaf in leaves(node)]
    index = data.draw(
        st.sampled_from([i for i, action in enumerate(row) if action.kind in BACKWARD])
    )
    backward = row[index]
    forward = Action(Kind.F, backward.stage, backward.microbatch)
    nodes: list[Node] = [*row]
    nodes[index] = Overlap(forward, backward)
    nodes.remove(forward)
    error = _refused(_with_row(schedule, rank, nodes))
    assert "a pair is of two microbatches" in str(error)
    assert (error.rank, error.position) == (rank, index - 1)


@pytest.mark.parametrize(
    ("rows", "rank", "position", "message"),
    [
        (["0F0,0B0,0I0,0W0"], 0, 2, "0B0 is I and W of the same"),
        (["0F0,0I0"], 0, None, "got 'no 0W0'"),
        (["0F0,0W0,0I0"], 0, 1, "rank 0 (0W0) for 0I0"),
        (["0F0"], 0, None, "got 'no 0B0'"),
        (["0F0,0F1,0B0,0B0"], 0, 3, "0B0 is at position 2 already"),
        (["0F0,0B0", "1F0,1B0,1SEND_B0"], 0, None, "got 'no 0RECV_B0'"),
        (
            ["0F0,0SEND_F0,0RECV_B0,0B0,0SEND_B0", "1RECV_F0,1F0,1B0,1SEND_B0"],
            0,
            4,
            "got '0SEND_B0'; nothing travels there",
        ),
        (["0SEND_F0,0F0,0RECV_B0,0B0", "1RECV_F0,1F0,1B0,1SEND_B0"], 0, 0, "(0SEND_F0) for 0F0"),
        (["0F0,0SEND_F0,0B0,0RECV_B0", "1RECV_F0,1F0,1B0,1SEND_B0"], 0, 2, "(0B0) for "),
        (["0F0,0OFFLOAD0,0B0"], 0, 1, "there is no 0PREFETCH0"),
        (["0F0,0PREFETCH0,0B0"], 0, 1, "for 0OFFLOAD0"),
        (["0F0,0OFFLOAD0,0B0,0PREFETCH0"], 0, 2, "(0B0) for 0PREFETCH0"),
        (["0OFFLOAD0,0F0,0PREFETCH0,0B0"], 0, 0, "(0OFFLOAD0) for 0F0"),
    ],
)
def test_what_is_wrong_is_named(
    rows: list[str], rank: int, position: int | None, message: str
) -> None:
    """Catches a verdict that does not help to find the mistake."""
    error = _refused(Schedule.from_text(rows, name="mine"))
    assert message in str(error)
    assert (error.rank, error.position) == (rank, position)
    where = f"schedule mine, rank {rank}" + (f", position {position}" if position else "")
    assert str(error).startswith(where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pp": 3}, "one row a rank, 3"),
        ({"vpp": 1}, "every rank holds 1 of 2 stages"),
        ({"placement": (0, 0, 0, 1)}, "every rank holds 2 of 4 stages"),
        ({"placement": (1, 0, 0, 1)}, "rank 0, position 0: got '0F0'; stage 0 is on rank 1"),
        ({"microbatches": 5}, "got 'no 0F4'"),
        ({"microbatches": 3}, "4 stages and 3 microbatches, from 0"),
    ],
)
def test_shape_and_rows_must_agree(change: dict[str, Any], message: str) -> None:
    """Catches a schedule whose numbers were edited and its rows not."""
    error = _refused(replace(interleaved_1f1b(2, 2, 4), **change))
    assert message in str(error)


def test_a_pair_is_a_forward_and_a_backward() -> None:
    """Catches two backwards as a pair, which no executor can run."""
    pair = Overlap(Action(Kind.B, 0, 0), Action(Kind.B, 0, 1))
    row: tuple[Node, ...] = (Action(Kind.F, 0, 0), Action(Kind.F, 0, 1), pair)
    error = _refused(Schedule("mine", 1, 1, 2, (row,), (0,)))
    assert (error.rank, error.position) == (0, 2)


def test_receives_posted_late_block_a_backend_that_does_not_buffer() -> None:
    """Catches a schedule that runs with small messages and hangs with large ones."""
    late = Schedule.from_text(
        [
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1",
            "1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1",
        ]
    )
    error = _refused(late)
    assert "rank 0 (0SEND_F1) for 1RECV_F1, rank 1 (1SEND_B0) for 0RECV_B0" in str(error)
    verify(
        Schedule.from_text(
            [
                "0F0,0SEND_F0,0RECV_B0,0F1,0SEND_F1,0B0,0RECV_B1,0B1",
                "1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1",
            ]
        )
    )


def test_ranks_waiting_for_each_other_are_all_named() -> None:
    """Catches a hang that no single rank can explain."""
    ring = Schedule.from_text(
        ["0F0,2F0,0F1,2F1,2B0,0B0,2B1,0B1", "1F1,1F0,3F0,3F1,3B0,1B0,3B1,1B1"]
    )
    error = _refused(ring)
    assert "rank 0 (2F0) for 1F0, rank 1 (1F1) for 0F1" in str(error)


def test_in_flight() -> None:
    """Catches a schedule that keeps more activations than was planned for."""
    schedule = one_f_one_b(4, 1, 8)
    verify(schedule)
    verify(schedule, in_flight=4)
    verify(schedule, in_flight=[4, 3, 2, 1])
    error = _refused(schedule, in_flight=[4, 2, 2, 1])
    assert (error.rank, error.position) == (1, 2)
    assert "it keeps 3 (stage, microbatch) for backward, at most 2" in str(error)
    _refused(replace(gpipe(4, 1, 8), in_flight=schedule.in_flight))
    verify(replace(gpipe(4, 1, 8), in_flight=None))


def test_forward_only() -> None:
    """Catches an evaluation schedule refused, or a training schedule without backwards accepted."""
    evaluation = Schedule.from_text(["0F0,0F1", "1F0,1F1"])
    verify(evaluation, forward_only=True)
    verify(insert_p2p(evaluation), forward_only=True)
    _refused(evaluation)
    assert "nothing but forwards" in str(_refused(gpipe(2, 1, 2), forward_only=True))


def test_k2s_schedule_is_verified_fast() -> None:
    """Catches a check that compares everything with everything: 50,000 nodes at each start."""
    schedule = insert_p2p(k2(16, 4, 128))
    start = time.process_time()
    verify(schedule)
    assert time.process_time() - start < 4.0  # about 1 on a free machine
