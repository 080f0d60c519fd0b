"""Kept tensors that leave the device for the host's memory and come back in time.

Copies run on a stream of their own, in the order in which they were begun. That order is what
makes a span of the slab free for the next tensor as soon as the copy out of it has been begun,
and a wait of the compute for a copy is what makes device memory free: nothing here asks the
clock. A schedule says when (``OFFLOAD``, ``PREFETCH``); a tensor that is loaded while it is
away is an error of the schedule.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from kimi_pretrain.activation.handles import Handle
from kimi_pretrain.activation.slab import Slab, needed
from kimi_pretrain.ops.streams import Stream, Ticket, open_stream


class State(StrEnum):
    """Where an offloadable tensor is."""

    HERE = "on the device"
    QUEUED = "on the device until the slab has room"
    LEAVING = "being copied to the host"
    AWAY = "on the host"
    COMING = "being copied back"
    BACK = "on the device again"


MOVES = {
    State.HERE: {State.QUEUED, State.LEAVING},
    State.QUEUED: {State.LEAVING, State.BACK},
    State.LEAVING: {State.AWAY, State.BACK},  # BACK: wanted again before it had left
    State.AWAY: {State.COMING},
    State.COMING: {State.BACK},
    State.BACK: set[State](),
}


def _nothing() -> None:
    """Nothing is reserved."""


class OffloadError(RuntimeError):
    """A tensor was asked for something that it cannot do where it is."""


class Offload:
    """Another handle's parts, which may lie on the host."""

    def __init__(self, inner: Handle) -> None:
        self.tag = inner.tag
        self.inner = inner
        self.state = State.HERE
        self.host: list[Tensor] = []  # views of the slab
        self.give_back: Callable[[], object] = (
            _nothing  # of its span; once, at the latest when it dies
        )
        self.ticket: Ticket | None = None  # of the copy under way

    @property
    def parts(self) -> list[Tensor]:
        return self.inner.parts

    @property
    def loaded(self) -> Tensor | None:
        return self.inner.loaded

    def load(self) -> Tensor:
        """As the inner handle's, once what comes back is here.

        Raises:
            OffloadError: it is on its way to the host, or there.
        """
        if self.state is State.COMING:
            assert self.ticket is not None
            self.ticket.wait()
            self.ticket = None
            self.move(State.BACK)
        if self.state in (State.LEAVING, State.AWAY):
            raise OffloadError(f"{self.tag} is wanted while {self.state}: no PREFETCH before it")
        return self.inner.load()

    def move(self, to: State) -> None:
        """Change the state.

        Raises:
            OffloadError: that does not follow from where it is.
        """
        if to not in MOVES[self.state]:
            raise OffloadError(f"{self.tag} is {self.state} and cannot be {to} next")
        self.state = to


@dataclass(frozen=True)
class _Parcel:
    """Tensors that leave in one copy."""

    number: int
    handles: list[Offload]
    ticket: Ticket


@dataclass
class Moved:
    """What an engine has done, in bytes."""

    out: int = 0  # copied to the host
    back: int = 0  # copied back
    stayed: int = 0  # wanted again before the slab had room, or before the copy had ended


class Offloader:
    """Moves handles' parts between a device and a slab of host memory."""

    def __init__(
        self,
        device: torch.device,
        host_bytes: int,
        stream: Stream | None = None,
        freed: Callable[[Tensor], None] = lambda part: None,
    ) -> None:
        """An engine.

        Args:
            device: of the tensors.
            host_bytes: of the slab.
            stream: for the copies; by default one of the engine's own.
            freed: told of every device tensor that is let go, by a test that poisons it.
        """
        self._device = device
        self.slab = Slab(host_bytes, device)
        self.stream = open_stream(device, "copy") if stream is None else stream
        self.moved = Moved()
        self._freed = freed
        self._leaving: deque[_Parcel] = deque()
        self._queued: deque[weakref.ref[Offload]] = deque()  # in the order in which they wait
        self._number = 0

    def leave(self, handles: Iterable[Offload]) -> Ticket | None:
        """Begin to copy what is on the device to the host; what finds no room waits its turn.

        What is larger than the whole slab stays, and what is empty has nothing to copy: an expert
        that nobody chose.
        """
        sent = []
        for handle in handles:
            size = needed(handle.parts)
            if handle.state is not State.HERE or not size:
                continue
            if size > self.slab.spans.capacity:
                self.moved.stayed += size
            elif self._queued or not self._reserve(handle):
                handle.move(State.QUEUED)
                self._queued.append(weakref.ref(handle))
            else:
                sent.append(handle)
        return self._send(sent)

    def mark(self) -> int:
        """What has begun to leave so far, for ``settle``."""
        return self._number

    def settle(self, mark: int) -> None:
        """Free the device tensors of what had begun to leave at ``mark``.

        The compute waits for their copies, so that whoever gets their memory next cannot
        overwrite what has not been read.
        """
        while self._leaving and self._leaving[0].number <= mark:
            parcel = self._leaving.popleft()
            parcel.ticket.wait()
            for handle in parcel.handles:
                if handle.state is State.LEAVING:
                    handle.move(State.AWAY)
                    handle.ticket = None
                    for part in handle.inner.parts:
                        self._freed(part)
                    handle.inner.parts.clear()

    def fetch(self, handles: Iterable[Offload]) -> Ticket | None:
        """Begin to copy back what is away; what has not left yet stays."""
        jobs: list[tuple[Tensor, Tensor]] = []
        coming = []
        for handle in handles:
            if handle.state in (State.QUEUED, State.LEAVING):
                self._stay(handle)
            elif handle.state is State.AWAY:
                parts = [torch.empty_like(host, device=self._device) for host in handle.host]
                jobs += zip(parts, handle.host, strict=True)
                handle.inner.parts.extend(parts)
                handle.move(State.COMING)
                coming.append(handle)
        ticket = self._copy(jobs) if jobs else None
        for handle in coming:
            handle.ticket = ticket
            self._let_go(handle)
        self.moved.back += sum(part.nbytes for part, _ in jobs)
        self._send_queued()
        return ticket

    def close(self) -> None:
        """Return when all copies have ended."""
        self.settle(self._number)
        self.stream.close()

    # --- the parts of it --------------------------------------------------------------------

    def _send(self, handles: list[Offload]) -> Ticket | None:
        if not handles:
            return None
        jobs = [pair for h in handles for pair in zip(h.host, h.inner.parts, strict=True)]
        ticket = self._copy(jobs)
        self._number += 1
        for handle in handles:
            handle.move(State.LEAVING)
            handle.ticket = ticket
        self._leaving.append(_Parcel(self._number, handles, ticket))
        self.moved.out += sum(part.nbytes for _, part in jobs)
        return ticket

    def _send_queued(self) -> None:
        """Send what waits for room, as far as there is room, in order."""
        sent = []
        while self._queued:
            handle = self._queued[0]()
            if handle is not None and handle.state is State.QUEUED:
                if not self._reserve(handle):
                    break
                sent.append(handle)
            self._queued.popleft()
        self._send(sent)

    def _stay(self, handle: Offload) -> None:
        """It is wanted again and still here: what its copy wrote is not read."""
        self.moved.stayed += sum(part.nbytes for part in handle.inner.parts)
        handle.move(State.BACK)
        handle.ticket = None
        self._let_go(handle)

    def _reserve(self, handle: Offload) -> bool:
        span = self.slab.spans.take(needed(handle.parts))
        if span is None:
            return False
        handle.host = self.slab.views(span, handle.parts)
        handle.give_back = weakref.finalize(handle, self.slab.spans.give_back, span)
        return True

    def _let_go(self, handle: Offload) -> None:
        """The next copy into this span runs after those that were begun: one stream, in order."""
        handle.host = []
        handle.give_back()

    def _copy(self, jobs: list[tuple[Tensor, Tensor]]) -> Ticket:
        def copy() -> None:
            for to, source in jobs:
                to.copy_(source, non_blocking=True)

        return self.stream.run(copy)
