"""Simulated steps against what can be said of them on paper."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p
from kimi_pretrain.pipeline.schedules import (
    GENERATORS,
    forward_only,
    generate,
    interleaved_1f1b,
    k2,
    zb_h1,
)
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COMPUTE, COPY, P2P, Peak, Timeline
from tests.pipeline.handmade import gpipe, one_f_one_b

# Powers of two, so that sums of seconds are exact.
MOE = Costs(
    layers=(1,),
    forward=Phases(attend=4, dispatch=1, expert=4, combine=2),
    backward=Phases(attend=8, dispatch=2, expert=8, combine=1),
    weight=Phases(attend=2, expert=2),
)


def text(*rows: str) -> Schedule:
    """A schedule by its rows."""
    return Schedule.from_text(rows)


def named(timeline: Timeline, resource: str, rank: int = 0) -> list[tuple[str, float, float]]:
    """The intervals of one resource of one rank, in order."""
    rows = sorted(timeline.ranks[rank], key=lambda interval: interval.start)
    return [(i.name, i.start, i.end) for i in rows if i.resource == resource]


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 3), (2, 2), (4, 8), (8, 24)])
def test_bubble_of_gpipe_and_1f1b(pp: int, microbatches: int) -> None:
    """Catches a rank that starts before its input is there, or later than it could."""
    costs = Costs.uniform(pp, forward=1, backward=1, weight=1)
    for schedule in (gpipe(pp, microbatches), one_f_one_b(pp, 1, microbatches)):
        timeline = simulate(schedule, costs)
        assert timeline.seconds == 3 * (microbatches + pp - 1)
        assert timeline.bubble == pytest.approx((pp - 1) / (microbatches + pp - 1), rel=1e-12)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 4, 16)])
def test_bubble_of_interleaved(pp: int, vpp: int, microbatches: int) -> None:
    """Catches virtual stages that do not shorten the bubble to (P-1)/(VM) of the compute."""
    costs = Costs.uniform(pp * vpp, forward=1, backward=1, weight=1)
    timeline = simulate(one_f_one_b(pp, vpp, microbatches), costs)
    compute = 3 * vpp * microbatches
    assert timeline.busy == (compute,) * pp
    assert timeline.seconds - compute == compute * (pp - 1) / (vpp * microbatches)


def test_peak_activations() -> None:
    """Catches memory counted at the wrong end of an action, or freed before W."""
    costs = replace(Costs.uniform(4, 1, 1, 1), layers=(3, 1, 1, 2))
    assert simulate(gpipe(4, 8), costs).peaks == (Peak(8, 24), Peak(8, 8), Peak(8, 8), Peak(8, 16))
    peaks = simulate(one_f_one_b(4, 1, 8), costs).peaks
    assert peaks == (Peak(4, 12), Peak(3, 3), Peak(2, 2), Peak(1, 2))
    one = Costs.uniform(1, 1, 1, 1)
    assert simulate(text("0F0,0I0,0F1,0W0,0I1,0W1"), one).peaks == (Peak(2, 2),)
    assert simulate(text("0F0,0I0,0W0,0F1,0I1,0W1"), one).peaks == (Peak(1, 1),)
    assert simulate(text("0F0,0F1"), one).peaks == (Peak(0, 0),)  # evaluation keeps nothing


def test_an_overlapped_layer() -> None:
    """Catches a phase out of the reference's order, and all-to-all that hides under nothing."""
    timeline = simulate(text("0F0,(0F1;0B0)OVERLAP_F_B,0B1"), MOE)
    start = 4 + 1 + 4 + 2
    pair = "(0F1;0B0)OVERLAP_F_B"
    compute = [row for row in timeline.ranks[0] if row.node == pair and row.resource == COMPUTE]
    network = [row for row in timeline.ranks[0] if row.node == pair and row.resource == ALL_TO_ALL]
    assert [(row.name, row.start - start, row.end - start) for row in compute] == [
        ("0F1 attend", 0, 4),
        ("0B0 expert", 4, 12),
        ("0B0 expert.W", 12, 14),
        ("0F1 expert", 14, 18),
        ("0B0 attend", 18, 26),
        ("0B0 attend.W", 26, 28),
    ]
    assert [(row.name, row.start - start, row.end - start) for row in network] == [
        ("0B0 combine", 0, 1),
        ("0F1 dispatch", 4, 5),
        ("0B0 dispatch", 12, 14),
        ("0F1 combine", 18, 20),
    ]
    # Outside the pair everything is exposed.
    assert timeline.exposed_all_to_all == (1 + 2 + 2 + 1,)


def test_slow_all_to_all_stalls_a_pair() -> None:
    """Catches a pair whose time is its compute's, whatever the network takes."""
    slow = replace(MOE, forward=Phases(attend=4, dispatch=16, expert=4, combine=32))
    timeline = simulate(text("0F0,(0F1;0B0)OVERLAP_F_B,0B1"), slow)
    pair = [row for row in timeline.ranks[0] if row.node.startswith("(")]
    start = min(row.start for row in pair)
    # f.dispatch keeps the network until 20, so b.dispatch runs 20-22 and f.expert 20-24; the
    # combine that follows outlasts b.attend and is awaited.
    assert {row.name: row.start - start for row in pair if row.resource == ALL_TO_ALL} == {
        "0B0 combine": 0,
        "0F1 dispatch": 4,
        "0B0 dispatch": 20,
        "0F1 combine": 24,
    }
    assert max(row.end for row in pair) - start == 56
    assert named(timeline, ALL_TO_ALL)[-2][1] == max(row.end for row in pair)  # 0B1 combine


@pytest.mark.parametrize(("layers", "alone"), [((2, 5), "0B0"), ((5, 2), "1F1")])
def test_a_pair_of_uneven_stages(layers: tuple[int, int], alone: str) -> None:
    """Catches layers dropped, or hidden under nothing, where two stages differ in length."""
    costs = replace(MOE, layers=layers)
    row = "0F0,1F0,0F1,(1F1;1B0)OVERLAP_F_B,1B1,0B0,0B1"
    if layers[0] < layers[1]:
        row = "0F0,1F0,(0F1;1B0)OVERLAP_F_B,1F1,1B1,0B0,0B1"
    timeline = simulate(Schedule("uneven", 1, 2, 2, text(row).ranks, (0, 0)), costs)
    assert timeline.busy == (2 * sum(layers) * (8 + 16 + 4),)
    pair = [i for i in timeline.ranks[0] if i.node.startswith("(") and i.resource == ALL_TO_ALL]
    forward = layers[0] if alone == "0B0" else layers[1]
    assert len(pair) == 2 * forward + 2 * layers[1]


def test_all_to_all_hides_in_steady_state() -> None:
    """Catches pairs that expose communication although their compute is longer."""
    costs = replace(MOE, layers=(2,) * 8)
    hidden = simulate(one_f_one_b(4, 2, 16, paired=True), costs)
    for rank in range(4):
        steady = [i for i in hidden.ranks[rank] if i.node.startswith("(")]
        first, last = min(i.start for i in steady), max(i.end for i in steady)
        exposed = [(a, b) for a, b in hidden.exposed(rank) if b > first and a < last]
        assert not exposed
    plain = simulate(one_f_one_b(4, 2, 16), costs)
    assert hidden.seconds < plain.seconds
    assert hidden.exposed_all_to_all < plain.exposed_all_to_all
    # Without communication there is nothing to win, and a longer way through the pipeline.
    still = Costs.uniform(8, 1, 1, 1)
    paired = simulate(one_f_one_b(4, 2, 16, paired=True), still)
    assert paired.seconds >= simulate(one_f_one_b(4, 2, 16), still).seconds


def test_messages_take_time() -> None:
    """Catches messages that are free, shared by two links, or charged within a rank."""
    costs = Costs.uniform(2, 2, 2, 2, p2p=1)
    timeline = simulate(gpipe(2, 1), costs)
    assert named(timeline, P2P, 0) == [("0SEND_F0", 2, 3)]
    assert named(timeline, P2P, 1) == [("1SEND_B0", 9, 10)]
    assert timeline.seconds == 14
    assert timeline.exposed_p2p == (1, 1)
    one_rank = Schedule("one", 1, 2, 1, text("0F0,1F0,1B0,0B0").ranks, (0, 0))
    assert simulate(one_rank, costs).seconds == 12


def test_messages_that_the_schedule_sends() -> None:
    """Catches a SEND that does not wait for its RECV, and a W that does not hide its message."""
    costs = Costs.uniform(2, 2, 2, 2, p2p=4)
    late = text("0F0,0SEND_F0,0RECV_B0,0B0", "1RECV_F0,1F0,1I0,1SEND_B0,1W0")
    timeline = simulate(late, costs)
    assert named(timeline, P2P, 0) == [("0SEND_F0", 2, 6)]
    assert named(timeline, P2P, 1) == [("1SEND_B0", 10, 14)]
    assert named(timeline, COMPUTE, 1)[-1] == ("1W0 weight", 10, 12)
    assert timeline.seconds == 18
    unposted = text("0F0,0SEND_F0,0F1,0F2,0F3,0F4,0F5,0F6,0RECV_B0,0B0", late.to_text()[1])
    assert named(simulate(unposted, costs), P2P, 1) == [("1SEND_B0", 14, 18)]


def test_copies() -> None:
    """Catches a backward that does not wait for its prefetch, and memory that is never freed."""
    costs = replace(Costs.uniform(1, 2, 2, 2), layers=(2,), offload=1, prefetch=2)
    timeline = simulate(text("0F0,0OFFLOAD0,0F1,0PREFETCH0,0B1,0B0"), costs)
    assert named(timeline, COPY) == [("0OFFLOAD0", 4, 6), ("0PREFETCH0", 8, 12)]
    assert timeline.peaks == (Peak(2, 4),)
    alone = simulate(text("0F0,0OFFLOAD0,0PREFETCH0,0B0"), costs)
    assert named(alone, COMPUTE)[2][1] == 10
    with pytest.raises(ScheduleError, match="0PREFETCH0"):
        simulate(text("0F0,0OFFLOAD0,0B0"), costs)


def test_first_and_last_stage_cost_more() -> None:
    """Catches an embedding or a head that is forgotten, or charged to every stage."""
    extra = replace(
        Costs.uniform(2, 1, 1, 1), first=Extra(forward=1, weight=2), last=Extra(4, 8, 16)
    )
    assert simulate(gpipe(2, 1), extra).busy == (3 + 1 + 2, 3 + 4 + 8 + 16)
    split = text("0F0,0I0,0W0", "1F0,1I0,1W0")
    assert simulate(split, extra).busy == (3 + 1 + 2, 3 + 4 + 8 + 16)


def test_a_deadlock_says_who_waits_for_what() -> None:
    """Catches a bad schedule that ends early with a fine step time."""
    costs = Costs.uniform(2, 1, 1, 1)
    with pytest.raises(ScheduleError) as caught:
        simulate(text("0F0,0B0,0F1,0B1", "1F1,1F0,1B0,1B1"), costs)
    message = str(caught.value)
    assert "rank 0 at position 1 waits for the gradient of 1I0" in message
    assert "rank 1 at position 0 waits for the output of 0F1" in message
    assert (caught.value.rank, caught.value.position) == (0, 1)
    with pytest.raises(ScheduleError, match="waits for 0F0"):
        simulate(text("0I0,0F0,0W0"), Costs.uniform(1, 1, 1, 1))
    with pytest.raises(ConfigError, match="2 stages"):
        simulate(gpipe(2, 1), Costs.uniform(3, 1, 1, 1))


seconds = st.integers(0, 64).map(lambda sixteenths: sixteenths / 16)


@settings(max_examples=60, deadline=None)
@given(
    pp=st.integers(1, 4),
    vpp=st.integers(1, 3),
    groups=st.integers(1, 3),
    paired=st.booleans(),
    phases=st.tuples(*[seconds] * 10),
    p2p=seconds,
    data=st.data(),
)
def test_no_step_beats_the_bounds(
    pp: int,
    vpp: int,
    groups: int,
    paired: bool,
    phases: tuple[float, ...],
    p2p: float,
    data: st.DataObject,
) -> None:
    """Catches time that is lost: work overlapped on one resource, or begun without its input."""
    layers = data.draw(st.lists(st.integers(1, 3), min_size=pp * vpp, max_size=pp * vpp))
    costs = Costs(
        layers=tuple(layers),
        forward=Phases(*phases[:4]),
        backward=Phases(*phases[4:8]),
        weight=Phases(attend=phases[8], expert=phases[9]),
        p2p=p2p,
    )
    schedule = one_f_one_b(pp, vpp, pp * groups, paired=paired)
    timeline = simulate(schedule, costs)
    each = [
        layer * (costs.forward.compute + costs.backward.compute + costs.weight.compute)
        for layer in layers
    ]
    for rank in range(pp):
        assert timeline.busy[rank] == pytest.approx(sum(each[rank::pp]) * pp * groups, rel=1e-9)
        for resource in (COMPUTE, ALL_TO_ALL):
            used = named(timeline, resource, rank)
            assert all(a[2] <= b[1] for a, b in pairwise(used))
    assert timeline.critical_path is not None
    assert timeline.seconds >= max(*timeline.busy, timeline.critical_path) - 1e-9
    assert 0.0 <= timeline.bubble < 1.0 or timeline.seconds == 0.0


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(GENERATORS)),
    pp=st.integers(1, 4),
    vpp=st.integers(1, 3),
    groups=st.integers(2, 4),
    p2p=seconds,
)
def test_every_generated_schedule(name: str, pp: int, vpp: int, groups: int, p2p: float) -> None:
    """Catches a schedule that only runs where its messages are implied, or the other way round."""
    vpp = {"1f1b": 1, "dualpipe_v": 2}.get(name, vpp)
    schedule = generate(name, pp, vpp, 2 * pp * groups)
    costs = replace(MOE, layers=(1,) * (pp * vpp), p2p=p2p)
    timeline = simulate(schedule, costs)
    sent = simulate(insert_p2p(schedule), costs)
    assert sent.critical_path == timeline.critical_path
    assert timeline.critical_path is not None
    for step in (timeline, sent):
        assert step.busy == (vpp * 2 * pp * groups * (8 + 16 + 4),) * pp
        assert step.seconds >= max(*step.busy, timeline.critical_path)
    # A receive can be posted later than its message is ready, never earlier.
    assert sent.seconds >= timeline.seconds
    if not p2p:
        assert sent.seconds == timeline.seconds
    if schedule.in_flight is not None:
        assert timeline.peaks is not None
        held = [peak.stages for peak in timeline.peaks]
        assert all(most <= limit for most, limit in zip(held, schedule.in_flight, strict=True))


def test_k2_hides_what_interleaved_exposes() -> None:
    """Catches a K2 schedule that is no faster than the one it starts from, at K2's shape."""
    costs = replace(MOE, layers=(2,) * 8, p2p=0.5)
    hidden, plain = simulate(k2(4, 2, 16), costs), simulate(interleaved_1f1b(4, 2, 16), costs)
    assert hidden.seconds < plain.seconds
    for rank in range(4):
        pairs = [i for i in hidden.ranks[rank] if i.node.startswith("(")]
        first, last = min(i.start for i in pairs), max(i.end for i in pairs)
        # One all-to-all in the pair at each end may be cut off from what would hide it.
        inside = [(a, b) for a, b in hidden.exposed(rank) if a >= first and b <= last]
        assert not inside


def test_weight_gradients_fill_the_bubble() -> None:
    """Catches a zero-bubble schedule whose W still stand in the way of the next rank."""
    costs = Costs.uniform(4, 1, 1, 1)
    plain, filled = simulate(one_f_one_b(4, 1, 8), costs), simulate(zb_h1(4, 1, 8), costs)
    assert plain.seconds - max(plain.busy) == 3 * (4 - 1)
    # arXiv 2401.10241: (p - 1)(F + I - W), a third of 1F1B's.
    assert filled.seconds - max(filled.busy) == 4 - 1


def test_offload_and_evaluation() -> None:
    """Catches copies that free nothing, and forwards by themselves that need a backward."""
    costs = replace(Costs.uniform(8, 1, 1, 1), offload=0.25, prefetch=0.25)
    schedule = interleaved_1f1b(4, 2, 8)
    kept, away = simulate(schedule, costs), simulate(insert_offload(schedule), costs)
    assert kept.peaks is not None
    assert away.peaks is not None
    assert away.peaks[0].stages < kept.peaks[0].stages
    evaluated = simulate(forward_only(4, 2, 8), costs)
    assert evaluated.seconds == 8 * 2 + 3
    assert evaluated.peaks == (Peak(0, 0),) * 4


def test_a_large_schedule_is_linear_work() -> None:
    """Catches intervals or visits that grow faster than the actions of the schedule."""
    pp, vpp = 16, 4
    costs = replace(MOE, layers=(1,) * (pp * vpp), p2p=1)
    timeline = simulate(one_f_one_b(pp, vpp, 128, paired=True), costs)
    layer_passes = pp * vpp * 128
    messages = 2 * (pp * vpp - 1) * 128
    assert sum(map(len, timeline.ranks)) == layer_passes * (4 + 6) + messages
