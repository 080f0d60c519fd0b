"""Tokens of one unit of input, in a file of their own: what a worker leaves behind.

A part is named after everything that shapes it, so a run that was killed finds what is
done already, and never a part of other settings or of a file that has changed since.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.documents import Defect, Document, Unit
from kimi_pretrain.data.readers import read
from kimi_pretrain.data.tokenizer_protocol import Tokenizer

LAYOUT = 1  # part of every name: raise it when what is written here changes
BATCH_CHARACTERS = 1 << 20
DEFECTS_SHOWN = 20

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class Part:
    """The documents of a unit. n documents, lengths in tokens with the closing one."""

    tokens: NDArray[np.int32]  # [sum of lengths]
    lengths: NDArray[np.int64]  # [n]
    sizes: NDArray[np.int64]  # [n], bytes of UTF-8 text
    digests: Digests  # [n, 2], hash of the content
    empty: int
    repaired: int
    skipped: int


@dataclass(frozen=True)
class Outcome:
    """What a worker reports: the first defects of a unit, and how many there were."""

    defects: tuple[Defect, ...]
    count: int


def part_name(unit: Unit, fingerprint: str, dedup: str, skip: bool) -> str:
    """File name of a unit's part: a hash of the unit, its files' state and the settings.

    Raises FileNotFoundError if a file went away.
    """
    states = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, unit.paths)]
    content = json.dumps([LAYOUT, asdict(unit), states, fingerprint, dedup, skip])
    return hashlib.sha256(content.encode()).hexdigest()[:32] + ".npz"


def digest(text: str, dedup: str) -> bytes:
    """128-bit hash of a document's content; of its words alone for ``dedup="whitespace"``.

    It names duplicates, and puts a document into the held-out split or not.
    """
    content = " ".join(text.split()) if dedup == "whitespace" else text
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def encode_unit(unit: Unit, tokenizer: Tokenizer, dedup: str, skip: bool, path: Path) -> Outcome:
    """Read and tokenise a unit into the part file `path`, which appears only when complete.

    With ``skip`` defects are counted in the part; without, a unit that has any leaves no part.
    """
    defects: list[Defect] = []
    part = _encode(_documents(unit, defects), tokenizer, dedup)
    if not defects or skip:
        _write(path, part, skipped=len(defects))
    return Outcome(tuple(defects[:DEFECTS_SHOWN]), len(defects))


def load(path: Path) -> Part:
    """Read a whole part."""
    with np.load(path, allow_pickle=False) as arrays:
        empty, repaired, skipped = arrays["counts"].tolist()
        return Part(
            arrays["tokens"],
            arrays["lengths"],
            arrays["sizes"],
            arrays["digests"],
            empty,
            repaired,
            skipped,
        )


def load_digests(path: Path) -> Digests:
    """Read a part's digests alone, [n, 2]."""
    with np.load(path, allow_pickle=False) as arrays:
        digests: Digests = arrays["digests"]
        return digests


def _documents(unit: Unit, defects: list[Defect]) -> Iterator[Document]:
    try:
        for item in read(unit):
            if isinstance(item, Document):
                yield item
            else:
                defects.append(item)
    except ConfigError as error:
        # Told as data: the exception would have to travel between processes.
        defects.append(Defect(error.what, str(error.value), error.rule, error.fix))


def _encode(documents: Iterator[Document], tokenizer: Tokenizer, dedup: str) -> Part:
    tokens: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    sizes: list[int] = []
    digests: list[bytes] = []
    batch: list[str] = []
    waiting = empty = repaired = 0

    def flush() -> None:
        for ids in tokenizer.encode_batch(batch):
            ids.append(tokenizer.eod_id)
            tokens.append(np.array(ids, dtype=np.int32))
            lengths.append(len(ids))
        batch.clear()

    for document in documents:
        if not document.text.strip():
            empty += 1
            continue
        repaired += document.repaired
        sizes.append(len(document.text.encode()))
        digests.append(digest(document.text, dedup))
        batch.append(document.text)
        waiting += len(document.text)
        if waiting >= BATCH_CHARACTERS:
            flush()
            waiting = 0
    flush()
    return Part(
        _joined(tokens),
        np.array(lengths, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2),
        empty,
        repaired,
        skipped=0,
    )


def _joined(tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)


def _write(path: Path, part: Part, skipped: int) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(
            file,
            tokens=part.tokens,
            lengths=part.lengths,
            sizes=part.sizes,
            digests=part.digests,
            counts=np.array([part.empty, part.repaired, skipped], dtype=np.int64),
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
