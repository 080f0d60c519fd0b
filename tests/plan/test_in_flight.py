"""What a rank holds at once, against the generators' promises and the simulator."""

import pytest

from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p
from kimi_pretrain.pipeline.schedules import generate
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.plan.in_flight import most_held


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
        held = most_held(schedule, rank, [1.0] * schedule.stages)
        assert held.device == held.microbatches == peak.stages
        assert held.host == 0


def test_bytes_are_those_of_each_stage() -> None:
    """Catches a mean over stages where one keeps more: the head's."""
    schedule = generate("k2", 2, 2, 8)
    light = most_held(schedule, 1, [1.0, 1.0, 1.0, 1.0]).device
    heavy = most_held(schedule, 1, [1.0, 1.0, 1.0, 10.0]).device
    assert light < heavy < 10 * light


def test_offloads_move_bytes_to_the_host() -> None:
    """Catches an offload that frees before its copy is done, or never."""
    plain = insert_p2p(generate("k2", 4, 1, 16))
    kept = most_held(plain, 0, [1.0] * 4)
    moved = most_held(insert_offload(plain), 0, [1.0] * 4)
    assert moved.device <= 4 < kept.device
    assert kept.device - moved.device <= moved.host <= kept.device
