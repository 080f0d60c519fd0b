"""Where a step's time goes, by a clock that the test sets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kimi_pretrain.parallel import stopwatch as module
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Work:
    """torch's handle of an operation that takes so long to wait for."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self, timeout: Any = None) -> None:
        del timeout
        self._wait()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def wait_for(group: Group, seconds: float, clock: Clock) -> None:
    """A collective of ``group`` for which this rank stands still."""
    handle = group._start("all_reduce", lambda: Work(lambda: clock.sleep(seconds)))
    handle.wait()
    handle.wait()  # as often as one likes: it counts once


def group(kind: str, stopwatch: Stopwatch) -> Group:
    made = Group(kind)
    made.stopwatch = stopwatch
    return made


def test_parts_add_up_and_waits_are_taken_out_of_the_stretch_they_lie_in(clock: Clock) -> None:
    """Catches a wait that counts as compute too, one that counts twice, and one of an expert's
    replicas that is lost."""
    watch = Stopwatch(CPU, clock)
    began = clock.time
    watch.start("data")
    clock.sleep(1)
    watch.enter("compute")
    clock.sleep(10)
    wait_for(group("ep", watch), 0.25, clock)
    wait_for(group("pp", watch), 0.5, clock)
    clock.sleep(3)
    wait_for(group("edp", watch), 2, clock)
    watch.enter("optimizer")
    wait_for(group("dp", watch), 4, clock)
    wait_for(group("world", watch), 8, clock)
    clock.sleep(7)
    parts = watch.stop()
    assert parts == {
        "data": 1,
        "compute": 13,
        "optimizer": 7,
        "ep": 0.25,
        "pp": 0.5,
        "dp": 6,
        "world": 8,
    }
    assert sum(parts.values()) == clock.time - began


def test_a_step_knows_nothing_of_what_came_before(clock: Clock) -> None:
    """Catches waits of an evaluation that are added to the next step, and a list that grows
    from step to step."""
    watch = Stopwatch(CPU, clock)
    world = group("world", watch)
    wait_for(world, 1, clock)
    watch.enter("compute")  # a step that nobody measures
    for _ in range(2):
        watch.start("data")
        wait_for(world, 2, clock)
        assert watch.stop() == {"data": 0, "world": 2}
        wait_for(world, 3, clock)
    assert not watch._waits


def test_between_steps_no_moment_is_taken() -> None:
    """Catches events made for every wait of an evaluation, and on a device that has none."""

    def clock() -> float:
        raise AssertionError("asked for the time")

    with Stopwatch(CPU, clock).waiting("ep"), Stopwatch(torch.device("meta")).waiting("ep"):
        pass


def test_a_failed_wait_still_counts(clock: Clock) -> None:
    """Catches a measured step in which the exception of a lost peer is swallowed."""
    watch = Stopwatch(CPU, clock)

    def fail() -> None:
        raise RuntimeError("a peer is gone")

    with pytest.raises(RuntimeError, match="a peer is gone"):
        group("ep", watch)._start("all_to_all", lambda: Work(fail)).wait()


def test_on_an_accelerator_events_are_read_once_the_step_is_over(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Catches milliseconds taken for seconds, and times asked of events still on their way."""

    class Event:
        done = False

        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.time

        def synchronize(self) -> None:
            Event.done = True

        def elapsed_time(self, end: "Event") -> float:
            assert Event.done
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(module.torch, "Event", Event)
    watch = Stopwatch(torch.device("cuda", 0), clock=lambda: 0.0)
    watch.start("compute")
    clock.sleep(2)
    since = watch.now()
    clock.sleep(1)
    watch.waited("ep", since)
    assert watch.stop() == {"compute": 2, "ep": 1}
