"""The parts of a real step, by a clock that goes on only where the test says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kimi_pretrain.telemetry.breakdown import PARTS, part_fields
from kimi_pretrain.train.step import TrainStep
from tests.distributed.setting import RATE, batch, configuration, open_step

PLANTED = 2.0  # seconds


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, once it has slept."""

        def call(*arguments: Any, **named: Any) -> Any:
            self.time += PLANTED
            return function(*arguments, **named)

        return call


def plant(part: str, step: TrainStep, clock: Clock) -> None:
    """A sleep in a part of the step that has begun."""
    if part == "data":
        clock.time += PLANTED
    if part == "compute":
        step.executor.run = clock.before(step.executor.run)  # type: ignore[method-assign]
    if part == "optimizer":
        step.optimizer.step = clock.before(step.optimizer.step)  # type: ignore[method-assign]
    if part == "world":  # the norm, for which all ranks wait
        norm = step.optimizer.norm

        def late() -> torch.Tensor:
            with step.stopwatch.waiting("world"):
                clock.time += PLANTED
            return norm()

        step.optimizer.norm = late  # type: ignore[method-assign]


@pytest.mark.parametrize("part", ["data", "compute", "optimizer", "world"])
def test_a_planted_sleep_shows_in_its_part_and_in_no_other(part: str) -> None:
    """Catches a boundary between two parts that was moved, and a wait that counts as compute."""
    step, clock = open_step(configuration(1, 1), torch.float64), Clock()
    step.stopwatch._clock = clock
    step.stopwatch.start("data")
    plant(part, step, clock)
    step.run(1, batch(), RATE)
    parts = step.stopwatch.stop()
    assert parts.keys() <= set(PARTS)
    assert {name: seconds for name, seconds in parts.items() if seconds} == {part: PLANTED}
    assert sum(part_fields(parts).values()) == PLANTED
