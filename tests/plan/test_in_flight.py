"""What a rank holds at once, against the generators' promises and the simulator."""

import pytest

from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p, insert_recompute
from kimi_pretrain.pipeline.schedules import generate
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.plan.activations import Kept, Segment
from kimi_pretrain.plan.in_flight import held_along, most_held


def leaving(*sizes: float) -> list[Kept]:
    """[stages] one segment each, all of it inputs of products and free to leave."""
    return [Kept({}, {"x": size}, {"y": 2.0}, (Segment(size, 2.0, size),)) for size in sizes]


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
    kept = Kept(
        {"x": 6.0}, {}, {}, (Segment(1.0, 0.0, 0.0), Segment(3.0, 0.0, 0.0), Segment(2.0, 0.0, 0.0))
    )
    row = "0F0,(0F1;0B0)OVERLAP_F_B,0B1"
    # Backwards 2, 3, 1 go and forwards 1, 3, 2 come: 6 - 2 + 1 - 3 + 3 - 1 + 2.
    assert held(row, kept) == [(6.0, 0.0), (6.0, 0.0), (6.0, 0.0)]
    lopsided = Kept({"x": 6.0}, {}, {}, (Segment(5.0, 0.0, 0.0), Segment(1.0, 0.0, 0.0)))
    assert held(row, lopsided)[1] == (10.0, 0.0)


def test_inputs_of_products_wait_for_w() -> None:
    """Catches a split backward that is planned to free everything, or nothing, at I."""
    kept = Kept({"x": 6.0}, {}, {}, (Segment(2.0, 0.0, 1.0), Segment(4.0, 0.0, 1.5)))
    assert held("0F0,0I0,0W0,0F1,0I1,0W1", kept)[:4] == [
        (6.0, 0.0),
        (6.0, 0.0),
        (2.5, 0.0),
        (6.0, 0.0),
    ]


def test_what_leaves_and_comes_back_along_a_row() -> None:
    """Catches bytes that are freed before the copy, or not there again in time."""
    kept = Kept({"stays": 1.0}, {"leaves": 4.0}, {"again": 2.0}, (Segment(5.0, 2.0, 0.0),))
    row = "0F0,0OFFLOAD0,0F1,0F2,0B2,0PREFETCH0,0B1,0RECOMPUTE0,0B0"
    assert held(row, kept) == [
        (5.0, 0.0),
        (5.0, 4.0),
        (10.0, 4.0),
        (11.0, 4.0),
        (11.0, 4.0),
        (10.0, 0.0),
        (10.0, 0.0),
        (7.0, 0.0),
        (7.0, 0.0),
    ]
    rows = insert_recompute(generate("k2", 1, 1, 3)).to_text()
    assert rows[0].count("RECOMPUTE") == 3


def test_weight_gradients_that_wait_add_up() -> None:
    """Catches schedules that put several W off planned with the gradients of one."""
    kept = Kept({"x": 6.0}, {}, {}, (Segment(6.0, 0.0, 1.0),), until_w=4.0, layers=2)
    for row, most in (("0F0,0F1,0I0,0I1,0W0,0W1", 8.0), ("0F0,0I0,0W0,0F1,0B1", 4.0)):
        moments = held_along(Schedule.from_text([row]), 0, [kept])
        assert max(moment.gradients for moment in moments) == most
    whole = held_along(Schedule.from_text(["0F0,0B0"]), 0, [kept])
    assert whole[1].gradients == 2.0
    fullest = most_held(Schedule.from_text(["0F0,0I0,0F1,0I1,0W0,0W1"]), 0, [kept])
    assert (fullest.device, fullest.gradients) == (7.0, 8.0)
