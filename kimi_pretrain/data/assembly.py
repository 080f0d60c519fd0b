"""From "which window of which file" to the arrays of a batch."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.data.recycling import BlockPool
from kimi_pretrain.data.windows import Indices, Windows

# Label of a position without a loss; torch's cross entropy ignores it by default.
IGNORED = -100

# Tokens that are read before they are widened, few enough to be in the cache still.
STRETCH_TOKENS = 1 << 15

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
class Documents:
    """The documents inside n consecutive samples, one after the other.

    Those of sample i are entries first[i] to first[i + 1]: the number in its sample and the
    tokens it has there, 0 for one that begins with the sample's last label. `ends` are the
    places of the last tokens that a document follows, in the flat samples; those of sample i
    are entries first[i] - i to first[i + 1] - i - 1, one fewer than its documents.
    """

    first: Indices  # [n + 1]
    number: NDArray[np.int32]  # [documents]
    length: Indices  # [documents]
    ends: Indices  # [documents - n]


@dataclass(frozen=True)
class Plan:
    """n consecutive samples, looked up but not read: the file and the window of each."""

    files: Sequence[Windows]
    file: list[int]
    window: list[int]
    documents: Documents | None  # None where documents run together

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.file)


def plan(files: Sequence[Windows], file: Indices, window: Indices, document_mask: bool) -> Plan:
    """A plan of n samples: file number and window of each, int64 [n]."""
    documents = _documents(files, file, window) if document_mask else None
    return Plan(files, file.tolist(), window.tolist(), documents)


def _documents(files: Sequence[Windows], file: Indices, window: Indices) -> Documents:
    count, length = len(file), max((windows.length for windows in files), default=0)
    samples, offsets = [np.arange(count)], [np.zeros(count, np.int64)]
    for number, windows in enumerate(files):
        here = np.flatnonzero(file == number)
        if len(here):
            which, offset = windows.boundaries(window[here])
            samples.append(here[which])
            offsets.append(offset)
    # In order, and once where an empty document begins beside another; offsets reach `length`.
    sample, offset = np.divmod(
        np.unique(np.concatenate(samples) * (length + 1) + np.concatenate(offsets)), length + 1
    )
    first = np.searchsorted(sample, np.arange(count + 1))
    place = sample * length + offset
    return Documents(
        first,
        (np.arange(len(sample)) - first[sample]).astype(np.int32),
        np.diff(place, append=count * length),
        place[offset > 0] - 1,
    )


def assemble(plan: Plan, first: int, last: int, length: int) -> Batch:
    """Read samples [first, last) of a plan. Raises OSError if a file cannot be read."""
    count = last - first
    tokens, labels = _pool.empty((2, count, length), np.int64)
    types = [windows.dtype for windows in plan.files]
    rows = max(1, STRETCH_TOKENS // length)
    memory = {dtype: _pool.empty((rows, length + 1), dtype) for dtype in set(types)}
    for begin, end in _stretches([types[file] for file in plan.file[first:last]], rows):
        places = slice(first + begin, first + end)
        read = memory[types[plan.file[first + begin]]][: end - begin]
        size, at, into = read[0].nbytes, 0, read.data.cast("B")
        for file, window in zip(plan.file[places], plan.window[places], strict=True):
            plan.files[file].read_into(window, into[at : at + size])
            at += size
        tokens[begin:end] = read[:, :-1]
        labels[begin:end] = read[:, 1:]
    documents = plan.documents
    if documents is None:
        return Batch(tokens, labels, None)
    begin, end = int(documents.first[first]), int(documents.first[last])
    labels.reshape(-1)[documents.ends[begin - first : end - last] - first * length] = IGNORED
    ids = np.repeat(documents.number[begin:end], documents.length[begin:end])
    return Batch(tokens, labels, ids.reshape(count, length))


def _stretches(types: Sequence[Hashable], rows: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence into [begin, end) of one type each, of at most `rows`."""
    begin = 0
    for end in range(1, len(types) + 1):
        if end == len(types) or end == begin + rows or types[end] != types[begin]:
            yield begin, end
            begin = end
