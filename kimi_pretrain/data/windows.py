"""Fixed-length windows over one domain's packed tokens, and their shuffled order.

Window w of a domain covers the tokens [w * length, (w + 1) * length] of its flat file: one
token more than its length, so that every position has a label. The extra one is the first
token of window w + 1; each token but the first is thus a label exactly once an epoch. The
tail that does not fill a window is left out.
"""

import mmap
import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.data.indexed import IndexedReader, bin_path
from kimi_pretrain.data.permutation import Permutation

# Bytes read through a map before its pages are given back.
MAPPED = 1 << 28

Indices = NDArray[np.int64]


class Windows:
    """The windows of one token file. Opening it costs the same at every size.

    Reads through a memory map of its own, and gives its pages back every ``MAPPED`` bytes: the
    kernel keeps what it likes in its cache, but the process does not grow with what it read.
    """

    def __init__(self, reader: IndexedReader, length: int) -> None:
        self.reader = reader
        self.length = length
        self.count = max(reader.total_tokens - 1, 0) // length
        self._file = os.open(bin_path(reader.prefix), os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        if not self.count:
            return
        self._map = mmap.mmap(self._file, self._size, access=mmap.ACCESS_READ)
        self._touched = 0
        # Overlapping rows over the flat file, the type on disk.  # [count, length + 1]
        stride = length * reader.itemsize
        self._rows: NDArray[Any] = np.ndarray(
            (self.count, length + 1), reader.dtype, self._map, strides=(stride, reader.itemsize)
        )

    def copy(self, window: int, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Write one window into tokens and labels, [length] each."""
        # Two conversions straight from the map: the second finds the row in the cache.
        row = self._rows[window]
        tokens[:] = row[:-1]
        labels[:] = row[1:]
        self._touched += row.nbytes

    def check(self) -> None:
        """To be called before a batch is copied.

        Raises OSError if the file changed its size since it was opened: touching a map past
        its file's end would kill the process.
        """
        if os.fstat(self._file).st_size != self._size:
            raise OSError(f"{bin_path(self.reader.prefix)} changed its size while open")
        if self._touched > MAPPED:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def boundaries(self, windows: Indices) -> tuple[Indices, Indices]:
        """Where documents begin inside windows [n]: (which of the n, offset), both int64 [k].

        Ordered by window, then offset. Offsets lie in [1, length]: what begins at 0 begins
        with the window, and the label of the last token stands at `length`. An empty document
        repeats an entry.
        """
        start = windows * self.length
        first, last = self.reader.document_at(np.stack((start, start + self.length)))
        later = last - first
        which = np.repeat(np.arange(len(windows)), later)
        # 1, 2, ... up to each window's number of later documents.
        step = np.arange(1, len(which) + 1) - np.repeat(np.cumsum(later) - later, later)
        return which, self.reader.starts(first[which] + step) - start[which]


def in_epochs(ordinals: Indices, count: int, *key: int | str) -> Indices:
    """The window that is read as the `ordinals`-th of a domain of `count` windows.

    Every epoch is the whole domain in an order of its own, chosen by (key, epoch); so no
    window comes twice before all have come once. int64 [n] -> int64 [n].
    """
    epochs, positions = np.divmod(ordinals, count)
    result = np.empty_like(ordinals)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        result[here] = Permutation(count, *key, epoch).array(positions[here])
    return result
