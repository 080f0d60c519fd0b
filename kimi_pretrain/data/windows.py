"""Fixed-length windows over one domain's packed tokens, and their shuffled order.

Window w of a domain covers the tokens [w * length, (w + 1) * length] of its flat file: one
token more than its length, so that every position has a label. The extra one is the first
token of window w + 1; each token but the first is thus a label exactly once an epoch. The
tail that does not fill a window is left out.
"""

import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.data.indexed import IndexedReader, bin_path
from kimi_pretrain.data.permutation import Permutation

Indices = NDArray[np.int64]


class Windows:
    """The windows of one token file. Opening it costs the same at every size.

    Tokens are read with `pread`, which copies the asked bytes and nothing else. Through a
    memory map the process would grow with all it ever read, and a file that was cut off or a
    failing disk would end it by SIGBUS, where this raises an OSError.
    """

    def __init__(self, reader: IndexedReader, length: int) -> None:
        self.reader = reader
        self.length = length
        self.count = max(reader.total_tokens - 1, 0) // length
        self._stride = length * reader.itemsize  # bytes
        self._file = os.open(bin_path(reader.prefix), os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The file's number type."""
        return self.reader.dtype

    def read_into(self, window: int, row: memoryview) -> None:
        """Write the window's length + 1 tokens, in the file's type, into `row`, bytes of as many.

        Raises OSError if the file became shorter than it was when it was opened.
        """
        if os.preadv(self._file, (row,), window * self._stride) != len(row):
            raise OSError(f"{bin_path(self.reader.prefix)} ends inside window {window}")

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
