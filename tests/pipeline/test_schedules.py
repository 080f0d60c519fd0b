"""Generators against their tables, their promises and torch's own."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Action, Kind, Overlap, Schedule
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.replay import compute_needs, spans
from kimi_pretrain.pipeline.schedules import (
    GENERATORS,
    dualpipe_v,
    forward_only,
    generate,
    gpipe,
    interleaved_1f1b,
    k2,
    one_f_one_b,
    zb_h1,
)
from kimi_pretrain.pipeline.verify import verify
from tests.pipeline.schedule_cases import (
    actions,
    forwards_first,
    needs_pinned_torch,
    row_text,
    schedules,
    shapes,
)


def _pairs(schedule: Schedule, rank: int) -> list[str]:
    return [str(node) for node in schedule.ranks[rank] if isinstance(node, Overlap)]


def _bubble(schedule: Schedule) -> float:
    """Idle share of the compute time, forwards taking 1 and backwards 2."""
    end = max(row[-1][1] for row in spans(schedule, compute_needs(schedule.stages)))
    return end / (3 * schedule.vpp * schedule.microbatches) - 1


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_shape_gives_a_schedule_that_runs(schedule: Schedule) -> None:
    """Catches a deadlock, a lost microbatch or more memory than promised at an odd shape."""
    verify(schedule)
    for rank in range(schedule.pp):
        ahead: dict[int, int] = {}
        for action in actions(schedule, rank):
            step = {Kind.F: 1, Kind.W: 0}.get(action.kind, -1)
            ahead[action.stage] = ahead.get(action.stage, 0) + step
            assert ahead[action.stage] >= 0
        assert set(ahead.values()) == {0}


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_warm_up(shape: tuple[int, int, int]) -> None:
    """Catches a rank that runs one forward too few (a stall) or too many (memory)."""
    pp, vpp, microbatches = shape
    if microbatches % pp:
        microbatches += pp - microbatches % pp
    everything = vpp * microbatches
    plain, paired = interleaved_1f1b(pp, vpp, microbatches), k2(pp, vpp, microbatches)
    for rank in range(pp):
        formula = 2 * (pp - rank - 1) + (vpp - 1) * pp
        ahead = formula if vpp > 1 else pp - rank - 1
        # the steady state begins with a forward, then a backward; in k2 with both in one
        assert forwards_first(plain, rank) == min(ahead + 1, everything)
        assert forwards_first(paired, rank) == min(formula + 1, everything)


def test_gpipe() -> None:
    """Catches backwards in the order of the forwards' stages."""
    assert row_text(gpipe(2, 2, 2), 1) == "1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1"


def test_1f1b() -> None:
    """Catches a row of the textbook's table that differs."""
    assert one_f_one_b(3, 1, 4).to_text() == [
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3",
        "1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3",
        "2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3",
    ]
    assert one_f_one_b(3, 1, 4).in_flight == (3, 2, 1)


def test_interleaved() -> None:
    """Catches chunks taken in another order than the published table's."""
    assert interleaved_1f1b(2, 2, 4).to_text() == [
        "0F0,0F1,2F0,2F1,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,2B2,2B3,0B2,0B3",
        "1F0,1F1,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,1B2,1B3",
    ]


def test_an_incomplete_last_group_in_megatrons_order() -> None:
    """Catches a remainder that is padded, dropped or refused (P2 V2 N3 M5)."""
    schedule = interleaved_1f1b(2, 2, 5, group_size=3)
    verify(schedule)
    for rank in range(2):
        order = [a.microbatch for a in actions(schedule, rank) if a.kind is Kind.F]
        assert order == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]


def test_k2_pairs() -> None:
    """Catches a first pair of one microbatch, and a steady state that is not all pairs."""
    schedule = k2(4, 2, 8)
    assert _pairs(schedule, 3)[0] == "(7F1;7I0)OVERLAP_F_B"
    assert row_text(schedule, 3).startswith("3F0,3F1,3F2,3F3,7F0,(7F1;7I0)OVERLAP_F_B,7W0,")
    for rank in range(4):
        assert len(_pairs(schedule, rank)) == 16 - (2 * (4 - rank - 1) + 4 + 1)


@pytest.mark.parametrize(
    ("pp", "vpp", "microbatches"), [(2, 1, 8), (4, 1, 16), (4, 2, 8), (8, 2, 16)]
)
def test_k2_is_interleaved_with_a_forward_more_ahead(pp: int, vpp: int, microbatches: int) -> None:
    """Catches pairs that change the order of forwards or of backwards: results must be bitwise."""
    plain, paired = interleaved_1f1b(pp, vpp, microbatches), k2(pp, vpp, microbatches)
    for rank in range(pp):
        for kinds, others in (
            ((Kind.F,), (Kind.F,)),
            ((Kind.B,), (Kind.I,)),
            ((Kind.B,), (Kind.W,)),
        ):
            one = [(a.stage, a.microbatch) for a in actions(plain, rank) if a.kind in kinds]
            two = [(a.stage, a.microbatch) for a in actions(paired, rank) if a.kind in others]
            assert one == two


@pytest.mark.parametrize(
    ("pp", "vpp", "microbatches"), [(4, 1, 16), (4, 2, 8), (4, 4, 16), (8, 2, 32)]
)
def test_bubbles(pp: int, vpp: int, microbatches: int) -> None:
    """Catches an order that runs, but late: a k2 whose neighbours take turns has a bubble of 1."""
    ideal = (pp - 1) / (vpp * microbatches)
    assert _bubble(gpipe(pp, 1, microbatches)) == pytest.approx(vpp * ideal)
    assert _bubble(interleaved_1f1b(pp, vpp, microbatches)) == pytest.approx(ideal)
    # only F + I of a rank's idle time are left: W runs while the others wait
    assert _bubble(k2(pp, vpp, microbatches)) == pytest.approx(ideal * 2 / 3)
    assert _bubble(zb_h1(pp, vpp, microbatches)) == pytest.approx(ideal / 3)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "k2", "zb_h1"])
def test_promises_are_kept_to_the_last_one(name: str) -> None:
    """Catches a promise of memory so loose that it bounds nothing."""
    vpp = 1 if name == "1f1b" else 2
    schedule = generate(name, 4, vpp, 16)
    assert schedule.in_flight is not None
    for rank, most in enumerate(schedule.in_flight):
        fewer = [*schedule.in_flight]
        fewer[rank] = most - 1
        with pytest.raises(ConfigError, match=f"rank {rank}, .* it keeps {most}"):
            verify(schedule, in_flight=fewer)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 8))
def test_larger_groups(shape: tuple[int, int, int], more: int) -> None:
    """Catches a warm-up that forgets the group size: a backward would come before its forward."""
    group = shape[0] + more
    for schedule in (interleaved_1f1b(*shape, group_size=group), k2(*shape, group_size=group)):
        verify(schedule)
        verify(insert_p2p(schedule))


def test_a_remainder_smaller_than_the_pipeline_does_not_block() -> None:
    """Catches the order that Megatron refuses: one microbatch left over on four ranks."""
    schedule = interleaved_1f1b(4, 3, 5)
    verify(schedule)
    # the plain order has 8F4 of this rank before a backward that 8F4's own input waits for
    plain = [a for a in actions(schedule, 0) if a.kind is Kind.F]
    assert [a.microbatch for a in plain] == [0, 1, 2, 3] * 3 + [4] * 3
    assert forwards_first(schedule, 0) == 2 * 3 + 2 * 4 + 1 - 1


def test_few_microbatches() -> None:
    """Catches a warm-up longer than all there is to do."""
    assert interleaved_1f1b(4, 2, 1).to_text()[3] == "3F0,7F0,7B0,3B0"
    assert k2(4, 2, 1).to_text()[3] == "3F0,7F0,7I0,7W0,3I0,3W0"
    assert k2(1, 1, 1).to_text() == ["0F0,0I0,0W0"]
    assert k2(1, 1, 3).to_text() == [
        "0F0,(0F1;0I0)OVERLAP_F_B,0W0,(0F2;0I1)OVERLAP_F_B,0W1,0I2,0W2"
    ]


def test_zb_h1() -> None:
    """Catches weight gradients that do not fill the bubble, or that cost more memory than 1F1B."""
    schedule = zb_h1(3, 1, 4)
    assert schedule.to_text() == [
        "0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3",
        "1F0,1F1,1I0,1F2,1I1,1W0,1F3,1I2,1W1,1I3,1W2,1W3",
        "2F0,2I0,2F1,2I1,2F2,2I2,2W0,2F3,2I3,2W1,2W2,2W3",
    ]
    assert schedule.in_flight == (3, 3, 3)


def test_forward_only() -> None:
    """Catches an evaluation that keeps activations or skips a microbatch."""
    schedule = forward_only(2, 2, 3)
    assert schedule.to_text()[1] == "1F0,1F1,3F0,3F1,1F2,3F2"
    verify(schedule, forward_only=True)


@pytest.mark.parametrize("placement", [(0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 1, 0)])
def test_forward_only_goes_where_the_stages_lie(placement: tuple[int, ...]) -> None:
    """Catches held-out batches sent to ranks that a looped schedule would have used."""
    schedule = forward_only(2, 2, 5, placement=placement)
    assert schedule.placement == placement
    verify(insert_p2p(schedule), forward_only=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_f_one_b(4, 2, 8), "parallel.vpp: got 2; .*parallel.schedule=interleaved_1f1b"),
        (lambda: dualpipe_v(4, 1, 8), "parallel.vpp: got 1; .*parallel.vpp=2"),
        (lambda: dualpipe_v(4, 2, 7), "microbatches: got 7; .*microbatches=8"),
        (lambda: k2(4, 2, 8, group_size=3), "group_size: got 3; .*group_size=4"),
        (lambda: gpipe(0, 1, 4), "parallel.pp: got 0; at least 1"),
        (lambda: k2(2, 0, 4), "parallel.vpp: got 0"),
        (lambda: forward_only(2, 1, 0), "microbatches: got 0"),
        (lambda: generate("1b1f", 2, 1, 4), "got '1b1f'; .*try parallel.schedule=1f1b"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_fix(call: Any, message: str) -> None:
    """Catches a bad shape that becomes an empty or endless schedule."""
    with pytest.raises(ConfigError, match=message):
        call()


def _torch_row(cls_name: str, rank: int, pp: int, vpp: int, microbatches: int) -> str:
    """What torch's schedule class lists for a rank, without its bubbles."""
    from torch.distributed.pipelining import schedules as theirs

    maker: Any = object.__new__(getattr(theirs, cls_name))  # its constructor wants modules
    maker.pp_group_size, maker.n_local_stages, maker._n_microbatches = pp, vpp, microbatches
    maker.number_of_rounds = max(1, microbatches // pp)
    maker.microbatches_per_round = microbatches // maker.number_of_rounds
    row = maker._calculate_single_rank_operations(rank)
    return ",".join(str(action) for action in row if action is not None)


@needs_pinned_torch
@pytest.mark.parametrize(
    ("name", "cls_name", "vpps"),
    [
        ("interleaved_1f1b", "ScheduleInterleaved1F1B", (2, 3, 4)),
        ("zb_h1", "ScheduleInterleavedZeroBubble", (1, 2, 3)),
        ("dualpipe_v", "ScheduleDualPipeV", (2,)),
    ],
)
def test_rows_are_torchs(name: str, cls_name: str, vpps: tuple[int, ...]) -> None:
    """Catches an order that is not the published one."""
    for vpp in vpps:
        for pp in (1, 2, 3, 4, 8):
            for microbatches in (2 * pp, 4 * pp):
                ours = generate(name, pp, vpp, microbatches).to_text()
                for rank in range(pp):
                    assert ours[rank] == _torch_row(cls_name, rank, pp, vpp, microbatches)


@needs_pinned_torch
@settings(max_examples=60, deadline=None)
@given(schedules())
def test_torchs_validator_accepts(schedule: Schedule) -> None:
    """Catches what our own verify and our generators have wrong together."""
    from torch.distributed.pipelining.schedules import _Action, _validate_schedule

    table = {
        rank: [_Action.from_str(cell) for cell in row.split(",")]
        for rank, row in enumerate(schedule.to_text())
    }
    found = _validate_schedule(table, schedule.pp, schedule.stages, schedule.microbatches)
    assert [found[stage] for stage in range(schedule.stages)] == list(schedule.placement)


def test_every_generator_has_a_name_of_the_configuration() -> None:
    """Catches `parallel.schedule` naming one thing and the schedule another."""
    for name in GENERATORS:
        vpp = 2 if name == "dualpipe_v" else 1
        schedule = generate(name, 2, vpp, 4)
        assert schedule.name == name
        assert Action(Kind.F, 0, 0) in actions(schedule, 0)
