"""Arrays whose memory is used again when the last reader lets go.

A batch of a few megabytes costs the allocator fresh pages each time, and faulting them in
costs more than filling them (a quarter to nine tenths of the reading time, measured). Handing
out the same buffer again and again would be cheap, but would change a batch under whoever
still holds it. Here a block returns to its pool when the array and all its views, torch
tensors included, are gone; until then nobody else gets it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Blocks kept for later of each kind: a prefetcher's depth and the batch in use.
KEPT = 4
# Kinds (shape and type) remembered; a run has a few: training, evaluation, its last batch.
KINDS = 8


class BlockPool:
    """Gives out arrays, uninitialised like ``np.empty``. Threads may share it."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], type[np.generic]], list[NDArray[Any]]] = {}

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A new array of `shape` and `dtype`."""
        kind = shape, dtype
        if kind not in self._free and len(self._free) == KINDS:
            self._free = {}
        free = self._free.setdefault(kind, [])
        try:
            block = free.pop()
        except IndexError:  # none yet, or another thread took the last one
            block = np.empty(shape, dtype)
        # numpy keeps the lease as the base of the array and of every view of it.
        return np.asarray(_Lease(block, free))


class _Lease:
    """Holds a block while an array refers to it."""

    def __init__(self, block: NDArray[Any], home: list[NDArray[Any]]) -> None:
        self._block, self._home = block, home
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        if len(self._home) < KEPT:
            self._home.append(self._block)
