"""A reserved piece of host memory that tensors come to and leave again."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: of every dtype, and of a copy engine's fast path


@dataclass(frozen=True)
class Span:
    """Bytes ``start .. start + size - 1`` of a slab."""

    start: int
    size: int


@dataclass
class Spans:
    """Which bytes of ``capacity`` are free: first fit, neighbours joined. No memory itself."""

    capacity: int
    used: int = 0
    most_used: int = 0
    _free: list[tuple[int, int]] = field(default_factory=list)  # (start, size), by start

    def __post_init__(self) -> None:
        self._free = [(0, self.capacity)] if self.capacity else []

    def take(self, size: int) -> Span | None:
        """A span of at least ``size`` bytes, aligned; None where none is free."""
        size = aligned(size)
        for position, (start, room) in enumerate(self._free):
            if room >= size:
                rest = [(start + size, room - size)] if room > size else []
                self._free[position : position + 1] = rest
                self.used += size
                self.most_used = max(self.most_used, self.used)
                return Span(start, size)
        return None

    def give_back(self, span: Span) -> None:
        """Make a taken span free again.

        Raises:
            ValueError: some of it is free already.
        """
        joined: list[tuple[int, int]] = []
        for start, size in sorted([*self._free, (span.start, span.size)]):
            end = sum(joined[-1]) if joined else 0
            if start < end:
                raise ValueError(f"{span} is given back twice")
            if joined and start == end:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self._free = joined
        self.used -= span.size


class Slab:
    """The memory behind ``Spans``; pinned for an accelerator, plain for a CPU."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Reserve ``capacity`` bytes for copies from and to ``device``."""
        pinned = device.type not in ("cpu", "meta")
        where = torch.device("meta" if device.type == "meta" else "cpu")
        self.spans = Spans(capacity)
        self._memory = torch.empty(capacity, dtype=torch.uint8, device=where, pin_memory=pinned)

    def views(self, span: Span, like: list[Tensor]) -> list[Tensor]:
        """Host tensors of these shapes and dtypes, one after the other in a span."""
        made, start = [], span.start
        for tensor in like:
            size = tensor.numel() * tensor.element_size()
            piece = self._memory[start : start + size]
            made.append(piece.view(tensor.dtype).view(tensor.shape))
            start += aligned(size)
        return made


def aligned(size: int) -> int:
    """``size`` bytes, rounded up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def needed(tensors: list[Tensor]) -> int:
    """Bytes of a span that holds them."""
    return sum(aligned(tensor.numel() * tensor.element_size()) for tensor in tensors)
