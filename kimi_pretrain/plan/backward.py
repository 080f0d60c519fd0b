"""What lies on the device while a microbatch's backward goes through its operations.

A tensor that is to be computed again is, when the first operation of the backward reads it, and so
are those that it is computed from; one in FP8 is widened, its codes there until that is done. Each
goes once the last has read it. What a product with a weight reads waits for W, and so does the
gradient of its output.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kimi_pretrain.config.activation import GRADIENTS, WAITING, Policy
from kimi_pretrain.plan.operations import BF16, FP8, Operation, Segment, Stored

# Tags whose readers take FP8 as it lies: their tensors are never widened.
READ_IN_FP8 = ("swiglu_in",)


class Bytes(NamedTuple):
    """Of what is kept, computed again and widened; and of gradients that wait for W."""

    device: float = 0.0
    gradients: float = 0.0

    @property
    def total(self) -> float:
        return self.device + self.gradients

    def plus(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device + other.device, self.gradients + other.gradients)

    def minus(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device - other.device, self.gradients - other.gradients)


class Step(NamedTuple):
    """What a segment adds to a device."""

    most: Bytes  # while it is computed, at its fullest
    after: Bytes  # once it is over


class Backward(NamedTuple):
    """Of one microbatch through one stage."""

    steps: tuple[Step, ...]  # of its segments, the last of the forward first
    waits: Bytes  # for W once it is over; of a whole backward, for those of its last segment


def kept_size(stored: Stored, policy: Policy) -> float:
    """Bytes a token of what backward finds, on the device or the host."""
    if policy.recompute:
        return 0.0
    return stored.size * FP8 / BF16 if policy.fp8 else stored.size


def backward_of(
    segments: Sequence[Segment],
    policy: Callable[[Stored], Policy],
    tokens: float = 1.0,
    only: str | None = None,
    *,
    ahead: bool,
    split: bool,
) -> Backward:
    """Follow a backward.

    Args:
        segments: of the stage, in the order of its forward.
        policy: of each tensor.
        tokens: of the microbatch.
        only: count tensors of this tag, or ``WAITING`` or ``GRADIENTS``; None: everything.
        ahead: all that is computed again is there already.
        split: W comes later, by itself; else the weight gradients of each segment are computed
            once it is over, those of the last when the next action begins.
    """
    device = _Device(segments, policy, tokens, only, ahead)
    steps = []
    for number, segment in enumerate(reversed(segments)):
        device.most = before = device.now
        for operation in reversed(segment):
            device.run(operation)
        most = device.most.minus(before)
        if not split and number < len(segments) - 1:
            device.compute_weights()
        steps.append(Step(most, device.now.minus(before)))
    return Backward(tuple(steps), device.now)


@dataclass
class _Device:
    segments: Sequence[Segment]
    policy: Callable[[Stored], Policy]
    tokens: float
    only: str | None
    ahead: bool

    def __post_init__(self) -> None:
        self.readers = living(self.segments, self.policy)
        self.waiting: set[Stored] = set()  # read by products, for W
        self.there: set[Stored] = set()  # as operations read it
        self.size: dict[Stored, float] = {}  # bytes a token, of what some handle holds
        self.now = self.most = Bytes()
        for stored in self.readers:
            if self.policy(stored).recompute and self.ahead:
                self._lies(stored, stored.size)
                self.there.add(stored)
                for source in stored.source:
                    self.readers[source] -= 1
            else:
                self._lies(stored, kept_size(stored, self.policy(stored)))
        for stored in [s for s, count in self.readers.items() if not count]:
            self._lies(stored, 0.0)

    def run(self, operation: Operation) -> None:
        for stored in operation.reads:
            self._load(stored)
        if operation.owes:
            self.waiting.update(operation.reads)
            if self.only in (None, GRADIENTS):
                self.now = self.now.plus(Bytes(0.0, self.tokens * operation.owes))
        for stored in operation.reads:
            self._release(stored)
        self._look()

    def compute_weights(self) -> None:
        for stored in self.waiting:
            if not self.readers[stored]:
                self._count(WAITING, -stored.size)
        self.waiting.clear()
        self.now = Bytes(self.now.device)

    def _load(self, stored: Stored) -> None:
        policy = self.policy(stored)
        if stored in self.there:
            return
        self.there.add(stored)
        if policy.recompute:
            for source in stored.source:
                self._load(source)
            self._lies(stored, stored.size)
            self._look()
            for source in stored.source:
                self._release(source)
        elif policy.fp8 and stored.tag not in READ_IN_FP8:
            codes = self.size[stored]
            self._lies(stored, codes + stored.size)
            self._look()
            self._lies(stored, stored.size)
        self._look()

    def _release(self, stored: Stored) -> None:
        self.readers[stored] -= 1
        if not self.readers[stored]:
            self._lies(stored, 0.0)
            if stored in self.waiting:
                self._count(WAITING, stored.size)

    def _lies(self, stored: Stored, size: float) -> None:
        self._count(stored.tag, size - self.size.get(stored, 0.0))
        self.size[stored] = size

    def _count(self, tag: str, size: float) -> None:
        if self.only in (None, tag):
            self.now = self.now.plus(Bytes(self.tokens * size))

    def _look(self) -> None:
        self.most = max(self.most, self.now, key=lambda held: held.total)


def living(segments: Sequence[Segment], policy: Callable[[Stored], Policy]) -> "Counter[Stored]":
    """How many still have to read each tensor: operations, and those computed again from it."""
    readers: Counter[Stored] = Counter()
    for segment in segments:
        for operation in segment:
            for stored in operation.reads:
                _read(stored, readers, policy)
    return readers


def _read(stored: Stored, readers: "Counter[Stored]", policy: Callable[[Stored], Policy]) -> None:
    readers[stored] += 1
    if readers[stored] == 1 and policy(stored).recompute:
        for source in stored.source:
            _read(source, readers, policy)
