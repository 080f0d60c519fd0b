"""Waits for copies are a part of a step, by a clock that goes on only where the test says."""

from functools import partial

import pytest
import torch

from kimi_pretrain.activation.handles import Keep
from kimi_pretrain.activation.offload import Offload, Offloader, State
from kimi_pretrain.activation.timed import TimedStream
from kimi_pretrain.ops.streams import Ticket, Work
from kimi_pretrain.parallel.stopwatch import Stopwatch
from kimi_pretrain.telemetry.breakdown import OWN, part_fields

CPU = torch.device("cpu")
COMPUTE, COPY = 3.0, 2.0  # seconds


class Slow:
    """Copies that a wait takes so long for; ``time`` is what the clock says."""

    def __init__(self) -> None:
        self.time = 100.0
        self.done = False

    def run(self, work: Work) -> Ticket:
        work()
        return self

    def wait(self) -> None:
        self.time += COPY

    def close(self) -> None:
        """Nothing is left."""


@pytest.mark.parametrize("waits", ["settle", "load"])
def test_a_wait_for_a_copy_is_told_by_itself(waits: str) -> None:
    """Catches a slow link to the host that shows as compute, in either direction, and a wait that
    is in both: parts would not add up to the step."""
    slow = Slow()
    stopwatch = Stopwatch(CPU, lambda: slow.time)
    engine = Offloader(CPU, 2**14, TimedStream(slow, partial(stopwatch.waiting, "offload")))
    handle = Offload(Keep("norm_in", torch.full((100,), 3.0)))
    if waits == "settle":
        stopwatch.start("compute")
    engine.leave([handle])
    engine.settle(engine.mark())
    if waits == "load":
        stopwatch.start("compute")
    engine.fetch([handle])
    slow.time += COMPUTE
    if waits == "load":
        assert handle.load().tolist() == [3.0] * 100
        assert handle.state is State.BACK
    parts = stopwatch.stop()
    assert parts == {"compute": COMPUTE, "offload": COPY}
    assert "offload" in OWN
    assert sum(part_fields(parts).values()) == COMPUTE + COPY
