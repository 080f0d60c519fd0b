r"""Megatron's indexed token files, ``<prefix>.bin`` and ``<prefix>.idx``, byte for byte.

``.bin`` holds every token one after the other. ``.idx``, little-endian and unaligned,
says where sequences and documents lie (S sequences, D = documents + 1):

====  =========================  ============================================
byte  content                    meaning
====  =========================  ============================================
0     ``MMIDIDX\0\0``              magic, 9 bytes
9     u64                        version, 1
17    u8                         token type, see ``TOKEN_TYPES``
18    u64                        S
26    u64                        D
34    i32[S]                     tokens of each sequence
..    i64[S]                     byte at which each sequence starts in ``.bin``
..    i64[D]                     sequence at which each document starts, then S
..    i8[S], optional            mode of each sequence (multimodal files)
====  =========================  ============================================

A document is one sequence in the files written here; Megatron's sentence-split files
have several. Readers here speak of documents and of token offsets only.

Opening costs the same for a megabyte and for 15.5T tokens: header, sizes and the ends of
the arrays are checked, nothing is loaded. ``IndexedReader.verify`` checks every entry.
"""

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.config.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Code in the header -> token type on disk. Codes 6 and 7 (f64, f32) hold no tokens.
TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
TYPE_CODES = {dtype: code for code, dtype in TOKEN_TYPES.items()}
# Megatron's own limit, a little under 65,536.
SMALL_VOCABULARY = 65_500
# Entries handled at a time where a whole array must be walked.
CHUNK = 1 << 20

Tokens = NDArray[np.integer[Any]]
Offsets = NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Token type on disk: u16 for a vocabulary below 65,500 tokens, i32 otherwise."""
    return np.dtype("<u2") if vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Token file of a prefix; a dot in the prefix is not a suffix to replace."""
    return Path(os.fspath(prefix) + ".bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Index file of a prefix."""
    return Path(os.fspath(prefix) + ".idx")


def index_bytes(lengths: Sequence[int], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Content of an ``.idx`` in pieces: documents of one sequence each, packed without gaps.

    lengths: tokens of each document; dtype: one of ``TOKEN_TYPES``.
    """
    count = len(lengths)
    sizes = np.array(lengths, dtype="<i4")
    yield HEADER.pack(MAGIC, VERSION, TYPE_CODES[dtype], count, count + 1)
    yield sizes.tobytes()
    start = 0
    for first in range(0, count, CHUNK):
        ends = start + np.cumsum(sizes[first : first + CHUNK], dtype=np.int64)
        starts = np.concatenate(([start], ends[:-1]))
        yield (starts * dtype.itemsize).astype("<i8").tobytes()
        start = int(ends[-1])
    for first in range(0, count + 1, CHUNK):
        yield np.arange(first, min(first + CHUNK, count + 1), dtype="<i8").tobytes()


class IndexedWriter:
    """Write documents in order; the files get their names only when all is on disk.

    Tokens stream to ``<prefix>.bin.tmp``; memory holds 4 bytes a document. ``finish``
    renames ``.bin`` first and ``.idx`` last, so a visible ``.idx`` means a complete pair.
    As a context manager it finishes on success and removes the temporary files on error.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.total_tokens = 0
        self._lengths = array("i")
        self._temporary = Path(f"{bin_path(self.prefix)}.tmp")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._temporary.open("wb", buffering=1 << 20)

    def __len__(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, ids: NDArray[Any]) -> None:
        """Append one document, ids [tokens] of any integer type.

        Raises ValueError if the ids are not integers in one dimension within
        [0, vocab_size): a wrapped id would train on a wrong token in silence.
        """
        self.add_documents(ids, np.array([len(ids)], dtype=np.int64))

    def add_documents(self, ids: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append many documents at once: ids [sum of lengths], lengths [documents].

        Raises ValueError as ``add_document`` does, or if the lengths do not add up.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            raise ValueError(f"ids must be integers [tokens], got {ids.dtype} {list(ids.shape)}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(
                f"ids must lie in [0, {self.vocab_size}), got {int(ids.min())} to {int(ids.max())}"
            )
        if int(lengths.sum()) != ids.size or (lengths.size and int(lengths.min()) < 0):
            raise ValueError(
                f"lengths add up to {int(lengths.sum())}, but there are {ids.size} ids"
            )
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._lengths.extend(lengths.tolist())
        self.total_tokens += ids.size

    def finish(self) -> None:
        """Write the index, flush both files to disk and give them their names."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        final, index = bin_path(self.prefix), idx_path(self.prefix)
        temporary_index = Path(f"{index}.tmp")
        with temporary_index.open("wb") as file:
            for piece in index_bytes(self._lengths, self.dtype):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        # An index that was there before must never stand beside the new tokens.
        index.unlink(missing_ok=True)
        self._temporary.replace(final)
        temporary_index.replace(index)
        directory = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def abort(self) -> None:
        """Drop what was written; an earlier finished pair of this prefix stays."""
        self._bin.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


class IndexedReader:
    """Read-only view of ``<prefix>.bin/.idx``; pages are loaded when touched.

    ``tokens`` is the flat map of ``.bin``, [total_tokens] in its type on disk. ``modes`` is
    i8 [sequences] or None. Raises ConfigError if the pair is absent, cut off or not tokens.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = Path(prefix)
        index, data = idx_path(prefix), bin_path(prefix)
        for path in (index, data):
            if not path.is_file():
                raise ConfigError(
                    "indexed token file",
                    str(path),
                    "<prefix>.bin and <prefix>.idx must both exist",
                    "kimi-pretrain data prepare, or a prefix without its .bin/.idx ending",
                )
        size = index.stat().st_size
        with index.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise _broken(index, header[: len(MAGIC)], f"it must start with {MAGIC!r}")
        _, version, code, sequences, entries = HEADER.unpack(header)
        if version != VERSION:
            raise _broken(index, f"version {version}", "only version 1 of the layout is known")
        if code not in TOKEN_TYPES:
            raise _broken(index, f"type code {code}", f"tokens have one of {sorted(TOKEN_TYPES)}")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if size not in (expected, expected + sequences):
            raise _broken(
                index, f"{size} bytes", f"{sequences} sequences, {entries} entries take {expected}"
            )
        self.dtype = TOKEN_TYPES[code]
        self._sequence_lengths = _mapped(index, "<i4", HEADER.size, sequences)
        self._pointers = _mapped(index, "<i8", HEADER.size + 4 * sequences, sequences)
        self._documents = _mapped(index, "<i8", HEADER.size + 12 * sequences, entries)
        self.modes = _mapped(index, "<i1", expected, sequences) if size != expected else None
        bytes_used = 0
        if sequences:
            bytes_used = int(self._pointers[-1]) + int(self._sequence_lengths[-1]) * self.itemsize
        if data.stat().st_size != bytes_used:
            raise _broken(data, f"{data.stat().st_size} bytes", f"its index tells {bytes_used}")
        if entries < 1 or self._documents[0] != 0 or self._documents[-1] != sequences:
            ends = self._documents[[0, -1]].tolist() if entries else []
            raise _broken(
                index, f"document ends {ends}", f"documents must span sequences 0 to {sequences}"
            )
        self.total_tokens = bytes_used // self.itemsize
        # Documents up to the last one with a sequence: empty ones at the end hold no token.
        self._filled = entries - 1
        while self._filled and self._documents[self._filled - 1] == sequences:
            self._filled -= 1
        self.tokens: Tokens = _mapped(data, self.dtype, 0, self.total_tokens)

    @property
    def itemsize(self) -> int:
        """Bytes a token on disk."""
        return int(self.dtype.itemsize)

    @property
    def sequences(self) -> int:
        """Number of Megatron sequences; equals the number of documents in files written here."""
        return len(self._sequence_lengths)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents) - 1

    def starts(self, documents: NDArray[Any]) -> Offsets:
        """Token offset at which each of these documents starts; `len(self)` gives the end.

        int64, shaped like ``documents``; cost is proportional to it, not to the corpus.
        """
        sequence = self._documents[documents]
        # The last entry, and empty documents at the end, have no pointer of their own.
        past = sequence >= self.sequences
        if self.sequences == 0:
            return np.zeros(np.shape(documents), dtype=np.int64)
        pointer = self._pointers[np.where(past, 0, sequence)] // self.itemsize
        return np.where(past, self.total_tokens, pointer).astype(np.int64)

    @property
    def document_starts(self) -> Offsets:
        """Token offset of every document, int64 [documents], computed on each call."""
        return self.starts(np.arange(len(self)))

    @property
    def lengths(self) -> Offsets:
        """Tokens of every document, int64 [documents], computed on each call."""
        return np.diff(self.starts(np.arange(len(self) + 1)))

    def doc(self, index: int) -> Tokens:
        """Tokens of one document, a read-only view in the type on disk."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, end = self.starts(np.array([index, index + 1])).tolist()
        return self.tokens[start:end]

    def document_at(self, positions: NDArray[Any]) -> Offsets:
        """Index of the document that holds each token, int64, shaped like ``positions``.

        A bisection over the mapped index, all positions in step: O(log documents) gathers.
        """
        pointers = positions * self.itemsize
        low = np.zeros(np.shape(positions), dtype=np.int64)
        high = np.full(np.shape(positions), self._filled, dtype=np.int64)
        for _ in range(self._filled.bit_length()):
            middle = (low + high) >> 1
            before = self._pointers[self._documents[middle]] <= pointers
            low = np.where(before, middle, low)
            high = np.where(before, high, middle)
        return low

    def verify(self) -> None:
        """Check every entry of the index; raises ConfigError at the first broken one.

        Sequences must follow each other without a gap, as every Megatron writer leaves
        them: windows are cut from the flat token file and would else cross the gaps.
        """
        index, expected = idx_path(self.prefix), 0
        for first in range(0, self.sequences, CHUNK):
            lengths = self._sequence_lengths[first : first + CHUNK].astype(np.int64)
            ends = expected + np.cumsum(lengths * self.itemsize)
            starts = np.concatenate(([expected], ends[:-1]))
            wrong = (self._pointers[first : first + CHUNK] != starts) | (lengths < 0)
            if wrong.any():
                bad = int(np.argmax(wrong))
                raise _broken(
                    index,
                    f"sequence {first + bad} at byte {int(self._pointers[first + bad])}",
                    f"it must start at byte {int(starts[bad])}",
                )
            expected = int(ends[-1])
        for first in range(0, len(self), CHUNK):
            entries = self._documents[first : first + CHUNK + 1]
            if (np.diff(entries) < 0).any():
                bad = first + int(np.argmax(np.diff(entries) < 0))
                raise _broken(index, f"document {bad}", "document starts must not decrease")


def _mapped(path: Path, dtype: Any, offset: int, count: int) -> NDArray[Any]:
    """A read-only map of `count` entries; mmap cannot map nothing, so that is an empty array."""
    if count == 0:
        return np.empty(0, dtype=dtype)
    # np.memmap's own subclass costs a microsecond an indexing; a plain view does not.
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def _broken(path: Path, value: object, rule: str) -> ConfigError:
    return ConfigError(
        f"indexed token file {path}", value, rule, "kimi-pretrain data prepare, which rewrites it"
    )
