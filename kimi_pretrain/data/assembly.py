"""From "which window of which file" to the arrays of a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.data.recycling import BlockPool
from kimi_pretrain.data.windows import Indices, Windows

# Label of a position without a loss; torch's cross entropy ignores it by default.
IGNORED = -100

# One for all streams, so that training and evaluation use the same memory in turn.
_pool = BlockPool()


@dataclass(frozen=True)
class Batch:
    """n samples of S tokens.

    tokens: int64 [n, S]. labels: int64 [n, S], the next token, or -100 where that belongs to
    the next document and documents are kept apart. document_ids: int32 [n, S], number of the
    token's document within its sample, from 0; None where documents run together.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.tokens)

    def split(self, size: int) -> Iterator["Batch"]:
        """Views of `size` samples each, in order; the last may be shorter."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            ids = None if self.document_ids is None else self.document_ids[part]
            yield Batch(self.tokens[part], self.labels[part], ids)


@dataclass(frozen=True)
class Plan:
    """Consecutive samples, looked up but not read.

    Sample i's documents begin at the offsets begins[first_begin[i] : first_begin[i + 1]], the
    first of them at 0, the last perhaps at S, where only a label stands. Both are None where
    documents run together.
    """

    files: Sequence[Windows]
    file: list[int]
    window: list[int]
    begins: Indices | None  # offsets in [0, S], [k]
    first_begin: Indices | None  # [n + 1]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.file)


def plan(files: Sequence[Windows], file: Indices, window: Indices, document_mask: bool) -> Plan:
    """A plan of n samples: file number and window of each, int64 [n]."""
    if not document_mask:
        return Plan(files, file.tolist(), window.tolist(), None, None)
    samples, offsets = [np.arange(len(file))], [np.zeros(len(file), np.int64)]
    for number, windows in enumerate(files):
        here = np.flatnonzero(file == number)
        if len(here):
            which, offset = windows.boundaries(window[here])
            samples.append(here[which])
            offsets.append(offset)
    # In order, and once where an empty document begins beside another.
    span = max((windows.length for windows in files), default=0) + 1
    places = np.unique(np.concatenate(samples) * span + np.concatenate(offsets))
    sample, begins = np.divmod(places, span)
    first = np.searchsorted(sample, np.arange(len(file) + 1))
    return Plan(files, file.tolist(), window.tolist(), begins, first)


def assemble(plan: Plan, first: int, last: int, length: int) -> Batch:
    """Read samples [first, last) of a plan. Raises OSError if a file cannot be read."""
    count = last - first
    tokens, labels = _pool.empty((2, count, length), np.int64)
    copiers = {number: plan.files[number].copier() for number in set(plan.file[first:last])}
    places = zip(plan.file[first:last], plan.window[first:last], tokens, labels, strict=True)
    for number, window, inputs, targets in places:
        copiers[number](window, inputs, targets)
    if plan.begins is None or plan.first_begin is None:
        return Batch(tokens, labels, None)
    bounds = plan.first_begin[first : last + 1]
    offsets = plan.begins[bounds[0] : bounds[-1]]
    documents = np.diff(bounds)  # of each sample
    row = np.repeat(np.arange(count), documents)
    number = np.arange(len(offsets)) - np.repeat(bounds[:-1] - bounds[0], documents)
    later = offsets > 0
    labels[row[later], offsets[later] - 1] = IGNORED
    inside = offsets < length
    lengths = np.diff((row * length + offsets)[inside], append=count * length)
    ids = np.repeat(number[inside].astype(np.int32), lengths).reshape(count, length)
    return Batch(tokens, labels, ids)
