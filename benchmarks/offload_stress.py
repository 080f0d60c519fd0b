"""The offload engine under copies that come late, on any device.

`make gpu-check` runs it on a GPU; on a CPU the same loop moves tensors by a thread, which is how
it is tested.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_pretrain.activation.handles import Keep
from kimi_pretrain.activation.offload import Offload, Offloader
from kimi_pretrain.activation.slab import aligned
from kimi_pretrain.ops.streams import Stream, Ticket, Work, open_stream

CYCLES_A_SECOND = 1.5e9  # of a GPU, about


def pause(device: torch.device, seconds: float) -> None:
    """Keep the stream, or the thread, of whoever calls busy for about as long."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_A_SECOND))
    else:
        time.sleep(seconds)


def poison(part: Tensor) -> None:
    """What an allocator does that gives the memory to somebody else at once."""
    part.fill_(torch.nan)


class Late:
    """A stream whose work begins late and ends late, each time by another while."""

    def __init__(self, stream: Stream, device: torch.device, longest: float) -> None:
        self._stream, self._device, self._longest = stream, device, longest
        self._random = random.Random(0)

    def run(self, work: Work) -> Ticket:
        before, after = (self._random.random() * self._longest for _ in range(2))

        def late() -> None:
            pause(self._device, before)
            work()
            pause(self._device, after)

        return self._stream.run(late)

    def close(self) -> None:
        self._stream.close()


class Unheeded:
    """A ticket for which nobody waits."""

    done = True

    def wait(self) -> None:
        """Return at once."""


class Hasty:
    """A stream for whose work nobody waits: the defect that the stress must show."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def run(self, work: Work) -> Ticket:
        self._stream.run(work)
        return Unheeded()

    def close(self) -> None:
        self._stream.close()


@dataclass(frozen=True)
class Stress:
    """What came of a stress: tensors that came back wrong, of how many, and bytes that moved."""

    wrong: int
    tensors: int
    back: int  # bytes copied back from the host
    left_in_slab: int  # bytes still taken when all was over


def stress(
    device: torch.device,
    steps: int,
    elements: int = 1000,
    longest: float = 2e-4,
    in_flight: int = 4,
    broken: Callable[[Stream], Stream] = lambda stream: stream,
) -> Stress:
    """Steps of a pipeline's stage, whose forwards fill a slab and whose backwards read it.

    Args:
        device: of the tensors.
        steps: how many.
        elements: fp32 numbers of a tensor.
        longest: seconds that a copy begins late, and ends late, at most.
        in_flight: microbatches between forward and backward; the slab has room for two more.
        broken: a defect in the stream of the copies.
    """
    stream = broken(Late(open_stream(device, "late copies"), device, longest))
    engine = Offloader(device, (in_flight + 2) * aligned(4 * elements), stream, poison)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    delays, number = random.Random(1), 0
    for _ in range(steps):
        held: list[tuple[float, Offload]] = []
        for _ in range(in_flight):
            number += 1
            mark = engine.mark()
            if device.type == "cuda":  # it runs behind the program, and a copy may overtake it
                pause(device, delays.random() * longest)
            full = torch.full((elements,), float(number), device=device)
            handle = Offload(Keep("norm_in", full))
            held.append((float(number), handle))
            del full
            torch.full((elements,), -1.0, device=device).sum()  # may take memory that was freed
            engine.settle(mark)
            engine.leave([handle])
        del handle
        engine.fetch([held[0][1]])
        while held:
            mark = engine.mark()
            value, handle = held.pop(0)
            if held:
                engine.fetch([held[0][1]])
            wrong += (handle.load() != value).any()
            engine.settle(mark)
    del handle
    engine.close()
    return Stress(int(wrong), number, engine.moved.back, engine.slab.spans.used)


@dataclass(frozen=True)
class Copies:
    """A tensor's way to the host and back, while the compute was busy."""

    right: bool
    pinned: bool
    freed: bool  # the device's memory, once the tensor had left
    beside: bool  # both copies ended before the compute did
    out: float  # bytes a second
    back: float


def copies_beside_compute(
    device: torch.device, elements: int, occupy: Callable[[], Callable[[], bool]]
) -> Copies:
    """Move one tensor [elements] while the compute does something else.

    Args:
        device: of the tensor.
        elements: fp32 numbers.
        occupy: gives the compute something to do, and returns how to ask whether it still does.
    """
    engine = Offloader(device, aligned(4 * elements))
    source = torch.arange(elements, device=device, dtype=torch.float32)
    handle = Offload(Keep("norm_in", source.clone()))
    taken = _allocated(device)
    # The copies are begun while the compute is idle: they wait for all that it was given before.
    begun = time.perf_counter()
    leaving = engine.leave([handle])
    busy = occupy()
    out = _until_done(leaving, begun)
    beside = busy()
    pinned = all(host.is_pinned() for host in handle.host)
    engine.settle(engine.mark())
    less = 4 * elements if device.type == "cuda" else 0
    freed = not handle.parts and _allocated(device) <= taken - less
    begun = time.perf_counter()
    coming = engine.fetch([handle])
    busy = occupy()
    back = _until_done(coming, begun)
    beside = beside and busy()
    right = torch.equal(handle.load(), source)
    engine.close()
    return Copies(right, pinned, freed, beside, 4 * elements / out, 4 * elements / back)


def _allocated(device: torch.device) -> int:
    """Bytes that tensors take of a GPU, which is idle then; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _until_done(ticket: Ticket | None, begun: float) -> float:
    assert ticket is not None
    while not ticket.done:
        time.sleep(1e-5)
    return time.perf_counter() - begun
