"""The plan of a measured step, from the step alone."""

from dataclasses import replace

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p
from kimi_pretrain.pipeline.schedules import gpipe, interleaved_1f1b, k2
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COMPUTE, Timeline
from kimi_pretrain.telemetry.measured_costs import measured_costs, measured_schedule

COSTS = Costs(
    layers=(2, 3, 3, 2),
    forward=Phases(4, 1, 4, 2),
    backward=Phases(8, 2, 8, 1),
    weight=Phases(attend=2, expert=4),
    first=Extra(1, 2, 4),
    last=Extra(8, 8, 8),
    p2p=0.5,
)
NO_ENDS = replace(COSTS, layers=(2, 2, 2, 2), first=Extra(), last=Extra())


@pytest.mark.parametrize("schedule", [gpipe(4, 1, 4), interleaved_1f1b(2, 2, 4)])
def test_costs_come_back(schedule: Schedule) -> None:
    """Catches a phase that is forgotten, or divided among the wrong number of layers."""
    timeline = simulate(schedule, COSTS)
    assert measured_costs(timeline) == COSTS
    assert measured_schedule(timeline) == schedule


def test_a_step_is_its_own_plan() -> None:
    """Catches a planned step that differs from a measured one in which nothing was late."""
    for schedule in (k2(2, 2, 4), k2(4, 1, 8), insert_p2p(k2(2, 2, 4))):
        timeline = simulate(schedule, NO_ENDS)
        again = simulate(measured_schedule(timeline), measured_costs(timeline))
        assert again.seconds == pytest.approx(timeline.seconds, rel=0.02)
        assert again.busy == timeline.busy
    copied = replace(NO_ENDS, offload=0.5, prefetch=0.25)
    timeline = simulate(insert_offload(interleaved_1f1b(2, 2, 8)), copied)
    found = measured_costs(timeline)
    assert (found.offload, found.prefetch) == (0.5, 0.25)
    assert simulate(measured_schedule(timeline), found).seconds == timeline.seconds


def test_waiting_is_not_a_cost() -> None:
    """Catches an all-to-all that waits for a slow peer and is then planned to be slow."""
    timeline = simulate(gpipe(4, 1, 4), COSTS)
    late = tuple(
        tuple(
            i._replace(end=i.end + i.rank) if i.resource == ALL_TO_ALL and "F1" in i.name else i
            for i in rank
        )
        for rank in timeline.ranks
    )
    assert measured_costs(Timeline("late", late)) == COSTS


def test_combining_computes_too() -> None:
    """Catches the weighted sum of rows, which is computed, taken for the rows' way back."""
    timeline = simulate(gpipe(2, 1, 2), replace(COSTS, layers=(2, 2)))
    first = timeline.ranks[0][0]
    sums = [
        first._replace(resource=COMPUTE, name=f"{action} combine", start=0.0, end=0.25)
        for action in ("0F0", "0F1", "0B0", "0B1")
    ]
    found = measured_costs(Timeline("run", ((*timeline.ranks[0], *sums), timeline.ranks[1])))
    assert found.forward == replace(COSTS.forward, attend=COSTS.forward.attend + 0.25)
    assert found.backward == replace(COSTS.backward, attend=COSTS.backward.attend + 0.25)


def test_a_trace_without_layers() -> None:
    """Catches a division by no layer where the rows are of something else."""
    timeline = simulate(gpipe(2, 1, 2), Costs.uniform(2, 1, 1, 1))
    renamed = tuple(tuple(i._replace(name=i.node) for i in rank) for rank in timeline.ranks)
    with pytest.raises(ConfigError, match="phases of its layers"):
        measured_costs(Timeline("other", renamed))
