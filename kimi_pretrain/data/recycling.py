"""Arrays whose memory is used again when the last reader lets go.

A batch of a few megabytes costs the allocator fresh pages each time, and faulting them in
costs more than filling them (a quarter to nine tenths of the reading time, measured). Handing
out the same buffer again and again would be cheap, but would change a batch under whoever
still holds it. Here a block is given out again when the array and all its views, torch tensors
included, are gone, which the block's reference count tells; until then nobody else gets it.
"""

from sys import getrefcount
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Blocks kept of each kind: a prefetcher's depth and the batch in use.
KEPT = 4
# Kinds (shape and type) remembered; a run has a few: training, evaluation, its last batch.
KINDS = 8


def _references() -> int:
    """Of a block that nobody uses, as `empty` counts them; Python 3.14 counts one fewer."""
    blocks = [np.empty(0)]
    for block in blocks:
        return getrefcount(block)
    raise AssertionError


UNUSED = _references()


class BlockPool:
    """Gives out arrays, uninitialised like ``np.empty``. Threads may share it."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[tuple[int, ...], np.dtype[Any]], list[NDArray[Any]]] = {}
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array of `shape` and `dtype`."""
        kind = shape, np.dtype(dtype)
        with self._lock:
            if kind not in self._blocks and len(self._blocks) == KINDS:
                self._blocks = {}
            blocks = self._blocks.setdefault(kind, [])
            # numpy keeps the block as the base of this view and of every view of it.
            for block in blocks:
                if getrefcount(block) == UNUSED:
                    return block.view()
            block = np.empty(shape, dtype)
            if len(blocks) < KEPT:
                blocks.append(block)
            return block.view()
