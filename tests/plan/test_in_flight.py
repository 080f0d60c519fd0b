"""What a rank holds at once, against the generators' promises and the simulator."""

import pytest

from kimi_pretrain.config.activation import Policy
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p, insert_recompute
from kimi_pretrain.pipeline.schedules import generate
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.plan.activations import Kept
from kimi_pretrain.plan.in_flight import held_along, most_held
from kimi_pretrain.plan.operations import Operation, Stored

POLICIES = {"leaves": Policy(offload=True), "again": Policy(recompute=True)}


def saved(*segments: list[Operation]) -> Kept:
    return Kept.of(segments, POLICIES)


def reading(tag: str, size: float) -> Operation:
    return Operation((Stored(tag, size),))


def product(tag: str, size: float, owes: float = 1e-9) -> Operation:
    return Operation((Stored(tag, size),), owes=owes)


def leaving(*sizes: float) -> list[Kept]:
    """[stages] one segment each, all of it inputs of products and free to leave."""
    return [saved([product("leaves", size)]) for size in sizes]


@pytest.mark.parametrize(
    ("name", "vpp"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("k2", 1), ("k2", 2), ("zb_h1", 1)],
)
def test_it_is_what_the_simulator_finds(name: str, vpp: int) -> None:
    """Catches a W that frees too early, or a pair that is counted one short."""
    schedule = generate(name, 4, vpp, 16)
    timeline = simulate(schedule, Costs.uniform(4 * vpp, 1.0, 1.0, 1.0))
    assert timeline.peaks is not None
    for rank, peak in enumerate(timeline.peaks):
        held = most_held(schedule, rank, leaving(*[1.0] * schedule.stages))
        assert held.device == held.microbatches == peak.stages
        assert held.host == 0


def test_bytes_are_those_of_each_stage() -> None:
    """Catches a mean over stages where one keeps more: the head's."""
    schedule = generate("k2", 2, 2, 8)
    light = most_held(schedule, 1, leaving(1.0, 1.0, 1.0, 1.0)).device
    heavy = most_held(schedule, 1, leaving(1.0, 1.0, 1.0, 10.0)).device
    assert light < heavy < 10 * light


def test_offloads_move_bytes_to_the_host() -> None:
    """Catches an offload that frees before its copy is done, or never."""
    plain = insert_p2p(generate("k2", 4, 1, 16))
    kept = most_held(plain, 0, leaving(*[1.0] * 4))
    moved = most_held(insert_offload(plain), 0, leaving(*[1.0] * 4))
    assert moved.device <= 4 < kept.device
    assert kept.device - moved.device <= moved.host <= kept.device


def held(row: str, kept: Kept) -> list[tuple[float, float]]:
    """(device, host) during each node of one rank's row."""
    schedule = Schedule.from_text([row])
    return [(moment.device, moment.host) for moment in held_along(schedule, 0, [kept])]


def test_a_pair_frees_one_while_it_fills_the_other() -> None:
    """Catches a pair that is planned with all of both microbatches."""
    kept = saved([reading("x", 1.0)], [reading("x", 3.0)], [reading("x", 2.0)])
    row = "0F0,(0F1;0B0)OVERLAP_F_B,0B1"
    # Backwards 2, 3, 1 go and forwards 1, 3, 2 come: 6 - 2 + 1 - 3 + 3 - 1 + 2.
    assert held(row, kept) == [(6.0, 0.0), (6.0, 0.0), (6.0, 0.0)]
    lopsided = saved([reading("x", 5.0)], [reading("x", 1.0)])
    assert held(row, lopsided)[1] == (10.0, 0.0)


def test_inputs_of_products_wait_for_w() -> None:
    """Catches a split backward that is planned to free everything, or nothing, at I."""
    kept = saved([reading("x", 1.0), product("x", 1.0)], [reading("x", 2.5), product("x", 1.5)])
    assert held("0F0,0I0,0W0,0F1,0I1,0W1", kept)[:4] == [
        (6.0, 0.0),
        (6.0, 0.0),
        (2.5, 0.0),
        (6.0, 0.0),
    ]


def test_what_leaves_and_comes_back_along_a_row() -> None:
    """Catches bytes that are freed before the copy, or not there again in time."""
    stays, leaves = Stored("stays", 1.0), Stored("leaves", 4.0)
    kept = saved([Operation((stays, leaves, Stored("again", 2.0, (stays,))))])
    row = "0F0,0OFFLOAD0,0F1,0F2,0B2,0PREFETCH0,0B1,0RECOMPUTE0,0B0"
    assert held(row, kept) == [
        (5.0, 0.0),
        (5.0, 4.0),
        (10.0, 4.0),
        (11.0, 4.0),
        (13.0, 4.0),
        (10.0, 0.0),
        (12.0, 0.0),
        (7.0, 0.0),
        (7.0, 0.0),
    ]
    rows = insert_recompute(generate("k2", 1, 1, 3)).to_text()
    assert rows[0].count("RECOMPUTE") == 3


def test_weight_gradients_that_wait_add_up() -> None:
    """Catches schedules that put several W off planned with the gradients of one."""
    kept = saved([reading("x", 5.0), product("x", 1.0, owes=4.0)])
    for row, most in (("0F0,0F1,0I0,0I1,0W0,0W1", 8.0), ("0F0,0I0,0W0,0F1,0B1", 4.0)):
        moments = held_along(Schedule.from_text([row]), 0, [kept])
        assert max(moment.gradients for moment in moments) == most
    fullest = most_held(Schedule.from_text(["0F0,0I0,0F1,0I1,0W0,0W1"]), 0, [kept])
    assert (fullest.device, fullest.gradients) == (7.0, 8.0)
    halves = saved([product("x", 1.0, owes=2.0)], [product("x", 1.0, owes=2.0)])
    whole = held_along(Schedule.from_text(["0F0,0B0,0F1,0B1"]), 0, [halves])
    assert [moment.gradients for moment in whole] == [0.0, 2.0, 0.0, 2.0]  # a segment's at a time


def test_the_last_weight_gradients_of_a_whole_backward_wait_for_the_next_computation() -> None:
    """Catches what is recomputed ahead planned without them: the gradient is sent in between."""
    x = Stored("x", 3.0)
    kept = saved([Operation((x,), owes=4.0), Operation((Stored("again", 2.0, (x,)),))])
    moments = held_along(Schedule.from_text(["0F0,0F1,0B1,0RECOMPUTE0,0B0"]), 0, [kept])
    assert [(moment.device, moment.gradients) for moment in moments[2:]] == [
        (6.0, 4.0),
        (8.0, 4.0),
        (3.0, 4.0),
    ]
