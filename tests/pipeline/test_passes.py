"""Passes: what they add, where, and what they leave alone."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Overlap,
    Schedule,
    leaves,
)
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.passes import (
    insert_offload,
    insert_p2p,
    insert_recompute,
    limit_weight_grad,
    overlap_expert_comm,
    split_weight_grad,
)
from kimi_pretrain.pipeline.schedules import dualpipe_v, gpipe, interleaved_1f1b, k2, one_f_one_b
from kimi_pretrain.pipeline.transfers import peer_stage, transfer
from kimi_pretrain.pipeline.verify import verify
from tests.pipeline.schedule_cases import actions, needs_pinned_torch, schedules, small_schedules

UNPAIRED = [  # torch's simulation does not know pairs
    schedule for schedule in small_schedules() if "OVERLAP" not in "".join(schedule.to_text())
]


def _work(schedule: Schedule) -> list[list[Action]]:
    """The compute actions of each rank, in order."""
    return [
        [action for action in actions(schedule, rank) if action.kind in COMPUTE]
        for rank in range(schedule.pp)
    ]


# ------------------------------------------------------------------ weight gradients


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_split_leaves_each_backward_its_weights(schedule: Schedule) -> None:
    """Catches a weight gradient lost or done twice, or one before its own input gradient."""
    split = split_weight_grad(schedule)
    verify(split)
    kinds = Counter(action.kind for row in _work(split) for action in row)
    each = schedule.stages * schedule.microbatches
    assert kinds == {Kind.F: each, Kind.I: each, Kind.W: each}
    assert split_weight_grad(split) == split


def test_weights_follow_the_send() -> None:
    """Catches W before its I's send: the previous stage would wait for it."""
    for plain in (one_f_one_b(3, 1, 4), interleaved_1f1b(3, 2, 6)):
        for done in (split_weight_grad(insert_p2p(plain)), insert_p2p(split_weight_grad(plain))):
            verify(done)
            for rank in range(done.pp):
                row = actions(done, rank)
                for i, action in enumerate(row):
                    if action.kind is Kind.I:
                        weights = row.index(Action(Kind.W, action.stage, action.microbatch))
                        between = row[i + 1 : weights]
                        assert not [each for each in between if each.kind in COMPUTE]
                        sent = [each for each in between if each.kind in SENDS]
                        assert sent == list(transfer(action, done.placement) or ())[:1]


def _put_off(schedule: Schedule, rank: int) -> int:
    """The most weight gradients that a rank owes at once."""
    most = now = 0
    for action in actions(schedule, rank):
        now += (action.kind is Kind.I) - (action.kind is Kind.W)
        most = max(most, now)
    return most


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 3))
def test_no_rank_puts_off_more_weight_gradients(schedule: Schedule, most: int) -> None:
    """Catches a W lost, done twice or before its I, one that stays put off, and an order in which
    the other work is done."""
    limited = limit_weight_grad(schedule, most)
    verify(limited)
    verify(insert_p2p(limited))
    for rank in range(schedule.pp):
        assert _put_off(limited, rank) <= most
        before, after = (
            [(a.stage, a.microbatch, a.kind is Kind.F) for a in row if a.kind is not Kind.W]
            for row in (_work(schedule)[rank], _work(limited)[rank])
        )
        assert before == after
    if max(_put_off(schedule, rank) for rank in range(schedule.pp)) <= most:
        assert limited == schedule


def test_the_oldest_weight_gradient_is_computed_first() -> None:
    """Catches W's all done at the first chance, where nothing but their number presses."""
    rows = ["0F0,0F1,0F2,0I0,0I1,0I2,0W0,0W1,0W2"]
    limited = limit_weight_grad(Schedule.from_text(rows), 2)
    assert limited.to_text() == ["0F0,0F1,0F2,0I0,0I1,0W0,0I2,0W1,0W2"]
    whole = limit_weight_grad(Schedule.from_text(["0F0,0F1,(0F2;0I0)OVERLAP_F_B,0W0,0B1,0B2"]), 0)
    assert whole.to_text() == ["0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2"]


def test_weights_of_a_pair_follow_the_pair() -> None:
    """Catches W between the halves of a pair, where it would hold up an all-to-all."""
    pair = Overlap(Action(Kind.F, 0, 1), Action(Kind.B, 0, 0))
    schedule = Schedule(
        "mine", 1, 1, 2, ((Action(Kind.F, 0, 0), pair, Action(Kind.B, 0, 1)),), (0,)
    )
    assert split_weight_grad(schedule).to_text() == [
        "0F0,(0F1;0I0)OVERLAP_F_B,0W0,0I1,0W1",
    ]


def test_delay() -> None:
    """Catches weight gradients that pile up beyond the delay, or are left at the end."""
    late = split_weight_grad(one_f_one_b(1, 1, 4), delay=[2])
    assert late.to_text() == ["0F0,0I0,0F1,0I1,0F2,0I2,0W0,0F3,0I3,0W1,0W2,0W3"]
    assert late.in_flight == (3,)
    verify(late)


# ------------------------------------------------------------------------------ pairs


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_pairs_keep_the_order_of_work(schedule: Schedule) -> None:
    """Catches a pairing that reorders forwards or backwards, or blocks the ranks."""
    paired = overlap_expert_comm(schedule)
    verify(paired)
    assert _work(paired) == _work(schedule)


def test_what_blocks_stays_apart() -> None:
    """Catches a pair whose backward waits for what the next rank makes of its forward."""
    plain = one_f_one_b(2, 1, 3)
    assert plain.to_text() == ["0F0,0F1,0B0,0F2,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"]
    paired = overlap_expert_comm(plain)
    verify(paired)
    for row in paired.ranks:
        for node in row:
            if isinstance(node, Overlap):
                assert node.forward.microbatch != node.backward.microbatch
    # the last rank's forwards are followed by their own backwards: nothing to pair
    assert paired.to_text()[1] == plain.to_text()[1]


def test_a_warm_up_stays_apart() -> None:
    """Catches the last warm-up forward held back for a backward that is far from ready."""
    plain = gpipe(2, 1, 3)
    assert overlap_expert_comm(plain).to_text()[1] == "1F0,1F1,(1F2;1B0)OVERLAP_F_B,1B1,1B2"
    assert overlap_expert_comm(plain, apart=[3, 3]) == plain
    assert k2(3, 1, 3).to_text()[1] == "1F0,1F1,1F2,1I0,1W0,1I1,1W1,1I2,1W2"


# -------------------------------------------------------------------------------- p2p


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_p2p_adds_messages_and_nothing_else(schedule: Schedule) -> None:
    """Catches a boundary without its message, one on the same rank, or computes reordered."""
    whole = insert_p2p(schedule)
    verify(whole)
    assert _work(whole) == _work(schedule)
    for rank, row in enumerate(whole.ranks):
        for node in row:
            for action in leaves(node):
                if action.kind in SENDS or action.kind in RECEIVES:
                    assert whole.placement[peer_stage(action)] != rank


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_receives_are_posted_a_node_ahead(schedule: Schedule) -> None:
    """Catches a receive posted when its compute is due: the message cannot travel before."""
    whole = insert_p2p(schedule)
    for row in whole.ranks:
        posted: dict[tuple[Kind, int, int], int] = {}
        computed = 0
        for node in row:
            if leaves(node)[0].kind not in COMPUTE:
                assert isinstance(node, Action)
                posted[node.kind, node.stage, node.microbatch] = computed
                continue
            for action in leaves(node):
                if action.kind is Kind.W:
                    continue
                kind = Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B
                at = posted.get((kind, action.stage, action.microbatch))
                assert at is None or at < computed or computed == 0
            computed += 1


def test_p2p_table() -> None:
    """Catches a send away from its compute, and both directions between two ranks mixed up."""
    assert insert_p2p(interleaved_1f1b(2, 2, 2)).to_text() == [
        "0F0,0SEND_F0,2RECV_F0,0F1,0SEND_F1,2RECV_F1,2F0,2SEND_F0,2RECV_B0,2F1,2SEND_F1,"
        "2RECV_B1,2B0,2SEND_B0,0RECV_B0,2B1,2SEND_B1,0RECV_B1,0B0,0B1",
        "1RECV_F0,1RECV_F1,1F0,1SEND_F0,3RECV_F0,1F1,1SEND_F1,3RECV_F1,3F0,3B0,3SEND_B0,"
        "3F1,1RECV_B0,3B1,3SEND_B1,1RECV_B1,1B0,1SEND_B0,1B1,1SEND_B1",
    ]


def test_neighbours_on_one_rank_need_no_message() -> None:
    """Catches a rank of dualpipe_v that sends to itself and waits for it."""
    whole = insert_p2p(dualpipe_v(2, 2, 4))
    assert whole.placement == (0, 1, 1, 0)
    for action in (Action(Kind.SEND_F, 1, 0), Action(Kind.RECV_B, 1, 0)):
        assert action not in actions(whole, 1)
    assert not [a for a in actions(insert_p2p(k2(1, 4, 4)), 0) if a.kind in SENDS]


@needs_pinned_torch
@settings(max_examples=40, deadline=None)
@given(schedules())
def test_messages_are_torchs(schedule: Schedule) -> None:
    """Catches messages or an order that torch's lowering and its own simulation disagree with."""
    from torch.distributed.pipelining import schedules as theirs

    def table(rows: list[str]) -> dict[int, Any]:
        return {
            rank: [theirs._Action.from_str(cell) for cell in row.split(",")]
            for rank, row in enumerate(rows)
        }

    placement = schedule.placement
    lowered = theirs._add_send_recv(
        table(schedule.to_text()), placement.__getitem__, schedule.stages
    )
    ours = insert_p2p(schedule).to_text()
    for rank, row in enumerate(ours):
        assert Counter(row.split(",")) == Counter(map(str, lowered[rank]))


@needs_pinned_torch
@pytest.mark.parametrize("schedule", UNPAIRED, ids=lambda s: f"{s.name}-{s.pp}-{s.vpp}")
def test_torch_runs_the_messages(schedule: Schedule) -> None:
    """Catches a table that blocks even where a receive, as in torch's simulation, never waits."""
    from torch.distributed.pipelining import schedules as theirs

    whole = insert_p2p(schedule)
    # torch's receives wait for their send: they go where they are needed
    table = {
        rank: [theirs._Action.from_str(cell) for cell in row.split(",")]
        for rank, row in enumerate(_receives_late(whole).to_text())
    }
    done = theirs._simulate_comms_compute(table, whole.placement.__getitem__, whole.stages)
    assert {rank: len([a for a in row if a]) for rank, row in done.items()} == {
        rank: len(row) for rank, row in enumerate(whole.ranks)
    }


def _receives_late(schedule: Schedule) -> Schedule:
    rows = []
    for row in schedule.ranks:
        out: list[Any] = []
        for node in row:
            if isinstance(node, Action) and node.kind in RECEIVES:
                continue
            for action in leaves(node):
                kind = Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B
                receive = Action(kind, action.stage, action.microbatch)
                if (action.kind is Kind.F or action.kind in BACKWARD) and receive in row:
                    out.append(receive)
            out.append(node)
        rows.append(tuple(out))
    return Schedule(
        "late", schedule.pp, schedule.vpp, schedule.microbatches, tuple(rows), schedule.placement
    )


def test_the_two_passes_before_p2p_refuse_what_has_it() -> None:
    """Catches passes in an order that would lose or double messages."""
    whole = insert_p2p(gpipe(2, 1, 2))
    for again in (insert_p2p, overlap_expert_comm):
        with pytest.raises(ScheduleError, match="without sends and receives"):
            again(whole)


def test_ranks_that_block_each_other_are_named() -> None:
    """Catches an endless loop or a bare assertion for a schedule from a file that cannot run."""
    blocked = Schedule.from_text(["0F0,0B0,0F1,0B1", "1F1,1B1,1F0,1B0"], name="mine")
    for each in (insert_p2p, overlap_expert_comm):
        with pytest.raises(
            ScheduleError, match=r"mine, rank 0, position 1: got '0B0'; it waits"
        ) as e:
            each(blocked)
        assert "rank 0 (0B0) for 1I0, rank 1 (1F1) for 0F1" in str(e.value)


# ---------------------------------------------------------------------------- offload


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_what_leaves_comes_back_one_backward_ahead(schedule: Schedule) -> None:
    """Catches a prefetch that its own backward waits for, or so early that memory is full again."""
    whole = insert_offload(insert_p2p(schedule))
    verify(whole)
    assert _work(whole) == _work(schedule)
    for rank in range(whole.pp):
        row = actions(whole, rank)
        away = {(a.stage, a.microbatch) for a in row if a.kind is Kind.OFFLOAD}
        assert away == {(a.stage, a.microbatch) for a in row if a.kind is Kind.PREFETCH}
        backwards = [(a.stage, a.microbatch) for a in row if a.kind in BACKWARD]
        back: list[tuple[int, int]] = []
        for action in row:
            if action.kind is Kind.PREFETCH:
                back.append((action.stage, action.microbatch))
            elif action.kind in BACKWARD:
                number = backwards.index((action.stage, action.microbatch))
                for later in back:
                    assert backwards.index(later) <= number + 1


def test_offload_table() -> None:
    """Catches an offload before the forward's send, and one of what is needed at once."""
    assert insert_offload(gpipe(1, 1, 4)).to_text() == [
        "0F0,0OFFLOAD0,0F1,0OFFLOAD1,0F2,0OFFLOAD2,0PREFETCH0,0F3,0OFFLOAD3,"
        "0PREFETCH1,0B0,0PREFETCH2,0B1,0PREFETCH3,0B2,0B3",
    ]
    rows = insert_offload(insert_p2p(one_f_one_b(3, 1, 3))).to_text()
    assert rows[0].startswith("0F0,0SEND_F0,0OFFLOAD0,")
    assert "OFFLOAD" not in rows[2]


def test_offload_runs_once() -> None:
    """Catches two copies of the same activations."""
    with pytest.raises(ScheduleError, match="rank 0, position 1: got '0OFFLOAD0'"):
        insert_offload(insert_offload(gpipe(1, 1, 4)))


def test_a_recomputation_stands_before_its_backward() -> None:
    """Catches one after the backward it is for, inside a pair, or twice."""
    assert insert_recompute(one_f_one_b(1, 1, 2)).to_text() == [
        "0F0,0RECOMPUTE0,0B0,0F1,0RECOMPUTE1,0B1"
    ]
    schedule = insert_recompute(insert_offload(insert_p2p(k2(4, 2, 8))))
    verify(schedule)
    for row in schedule.ranks:
        for before, node in pairwise(row):
            backward = [leaf for leaf in leaves(node) if leaf.kind in (Kind.I, Kind.B)]
            for leaf in backward:
                assert before == Action(Kind.RECOMPUTE, leaf.stage, leaf.microbatch)
    with pytest.raises(ScheduleError, match="insert_recompute runs once"):
        insert_recompute(schedule)


@pytest.mark.parametrize(
    "row",
    ["0RECOMPUTE0,0F0,0B0", "0F0,0B0,0RECOMPUTE0", "0F0,0OFFLOAD0,0RECOMPUTE0,0PREFETCH0,0B0"],
)
def test_a_recomputation_needs_what_it_starts_from(row: str) -> None:
    """Catches a recomputation before its forward, after its backward, or from what is away."""
    with pytest.raises(ScheduleError):
        verify(Schedule.from_text([row]))
