"""Megatron's files as wholes: several joined into one, an index written anew from its tokens.

These keep what is in a file, sentence sequences and modes included, where
``indexed.IndexedWriter`` writes one sequence a document.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.indexed import (
    HEADER,
    MAGIC,
    TYPE_CODES,
    VERSION,
    IndexedReader,
    bin_path,
    idx_path,
)

CHUNK = 1 << 24  # tokens looked at together


def merge_files(inputs: Sequence[Path], output: Path) -> None:
    """Append files to each other under a new prefix, in the order given.

    The tokens are copied byte for byte. Raises ConfigError if an input is broken, if the
    token types differ, if some have modes and some have not, or if the output exists.
    """
    readers = [IndexedReader(prefix) for prefix in inputs]
    for reader in readers:
        reader.verify()
    for what, values in (
        ("token type", [reader.dtype.name for reader in readers]),
        ("modes", ["no" if reader.modes is None else "yes" for reader in readers]),
    ):
        if len(set(values)) > 1:
            told = ", ".join(f"{p} {v}" for p, v in zip(inputs, values, strict=True))
            raise ConfigError(
                f"{what} of files to merge", told, "all must have the same", "files of one kind"
            )
    _must_be_free(bin_path(output))
    _must_be_free(idx_path(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{bin_path(output)}.tmp")
    with temporary.open("wb") as file:
        for prefix in inputs:
            with bin_path(prefix).open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(bin_path(output))
    firsts = np.cumsum([0, *(reader.sequences for reader in readers)])
    arrays = [_arrays(reader) for reader in readers]
    documents = [
        starts[1:] + first for (_, starts), first in zip(arrays, firsts.tolist()[:-1], strict=True)
    ]
    modes = [reader.modes for reader in readers if reader.modes is not None]
    write_index(
        idx_path(output),
        readers[0].dtype,
        np.concatenate([lengths for lengths, _ in arrays]),
        np.concatenate([np.zeros(1, dtype=np.int64), *documents]),
        np.concatenate(modes) if modes else None,
    )


def rebuild_index(prefix: Path, dtype: np.dtype[Any], end_of_document: int) -> int:
    """Write ``.idx`` anew from ``.bin``: a document ends at every ``end_of_document``.

    Returns the number of documents. Raises ConfigError if the index exists, if the bytes
    are no whole number of tokens, or if the last token does not end a document.
    """
    _must_be_free(idx_path(prefix))
    path = bin_path(prefix)
    if not path.is_file():
        raise ConfigError("token file", str(path), "it must exist", "a prefix without .bin")
    size = path.stat().st_size
    tokens = np.memmap(path, dtype=dtype, mode="r") if size and size % dtype.itemsize == 0 else None
    if tokens is None or tokens[-1] != end_of_document:
        raise ConfigError(
            f"tokens of {path}",
            f"{size} bytes" if tokens is None else f"last token {int(tokens[-1])}",
            f"they must be whole {dtype.name} and end with token {end_of_document}",
            "--eod and --dtype of the tokenizer that made the file",
        )
    ends = [
        np.flatnonzero(tokens[first : first + CHUNK] == end_of_document) + first + 1
        for first in range(0, len(tokens), CHUNK)
    ]
    lengths = np.diff(np.concatenate([np.zeros(1, dtype=np.int64), *ends]))
    write_index(idx_path(prefix), dtype, lengths, np.arange(len(lengths) + 1), None)
    return len(lengths)


def write_index(
    path: Path,
    dtype: np.dtype[Any],
    lengths: NDArray[np.integer[Any]],
    documents: NDArray[np.integer[Any]],
    modes: NDArray[np.integer[Any]] | None,
) -> None:
    """Write an ``.idx`` in one step (layout: ``indexed.py``).

    lengths: tokens of each sequence, [S]. documents: sequence at which each begins, then S,
    [documents + 1]. modes: [S] or None.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, TYPE_CODES[dtype], len(lengths), len(documents)))
        file.write(lengths.astype("<i4").tobytes())
        file.write((starts * dtype.itemsize).astype("<i8").tobytes())
        file.write(documents.astype("<i8").tobytes())
        if modes is not None:
            file.write(modes.astype("<i1").tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _arrays(reader: IndexedReader) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens of each sequence [S], and the sequence at which each document begins, then S."""
    path, sequences = idx_path(reader.prefix), reader.sequences
    lengths = np.fromfile(path, "<i4", sequences, offset=HEADER.size)
    return lengths, np.fromfile(path, "<i8", len(reader) + 1, offset=HEADER.size + 12 * sequences)


def _must_be_free(path: Path) -> None:
    if path.exists():
        raise ConfigError(
            "file to write", str(path), "it must not exist yet", f"rm {path}, or another prefix"
        )
