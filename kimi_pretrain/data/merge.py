"""Parts in the order of their input to one domain's token files, duplicates left out."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.data.indexed import IndexedWriter, bin_path, idx_path
from kimi_pretrain.data.manifest import FilesRecord, InputRecord
from kimi_pretrain.data.parts import Digests, load, load_digests
from kimi_pretrain.data.progress import Progress

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Merged:
    """What was written: files by split, and (documents, bytes) kept of each source."""

    files: dict[str, FilesRecord]
    sources: dict[str, tuple[int, int]]
    input: InputRecord


def first_occurrences(digests: Digests) -> NDArray[np.bool_]:
    """Whether each of the digests [n, 2] is the first of its value, bool [n]."""
    # lexsort is stable: among equals the earliest document stands first.
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    first = np.ones(len(digests), dtype=np.bool_)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def held_out(digests: Digests, share: float) -> NDArray[np.bool_]:
    """Which documents are held out, bool [n]: those whose digest lies in the lowest share."""
    return digests[:, 0] < np.uint64(int(share * 2**64))


def merge(
    corpus: Path,
    domain: str,
    parts: Sequence[tuple[str, Path]],
    vocab_size: int,
    dedup: bool,
    heldout: float,
    progress: Progress,
) -> Merged:
    """Write ``train/<domain>`` and ``heldout/<domain>`` of a corpus from (source, part) pairs.

    Without any held-out document there are no held-out files. Memory: 16 bytes a document
    and one part.
    """
    stage = f"write {domain}"
    digests = np.concatenate(
        [np.empty((0, 2), dtype=np.uint64), *(load_digests(path) for _, path in parts)]
    )
    keep = first_occurrences(digests) if dedup else np.ones(len(digests), dtype=np.bool_)
    apart = held_out(digests, heldout)
    chosen = {"train": keep & ~apart, "heldout": keep & apart}
    splits = [split for split in SPLITS if split == "train" or chosen[split].any()]
    text_bytes = dict.fromkeys(splits, 0)
    sources: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    read = InputRecord(duplicates=int((~keep).sum()))
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(corpus / split / domain, vocab_size))
            for split in splits
        }
        first = 0
        for done, (source, path) in enumerate(parts):
            progress(stage, done, len(parts))
            part = load(path)
            rows = slice(first, first + len(part.lengths))
            first = rows.stop
            for split in splits:
                mask = chosen[split][rows]
                writers[split].add_documents(
                    part.tokens[np.repeat(mask, part.lengths)], part.lengths[mask]
                )
                size = int(part.sizes[mask].sum())
                text_bytes[split] += size
                documents, total = sources[source]
                sources[source] = (documents + int(mask.sum()), total + size)
            read = replace(
                read,
                documents=read.documents + len(part.lengths) + part.empty,
                bytes=read.bytes + int(part.sizes.sum()),
                empty=read.empty + part.empty,
                repaired=read.repaired + part.repaired,
                skipped=read.skipped + part.skipped,
            )
    files = {
        split: FilesRecord(
            prefix=f"{split}/{domain}",
            documents=len(writer),
            tokens=writer.total_tokens,
            bytes=text_bytes[split],
            bin_sha256=sha256(bin_path(writer.prefix)),
            idx_sha256=sha256(idx_path(writer.prefix)),
        )
        for split, writer in writers.items()
    }
    for split in set(SPLITS) - set(splits):
        # Of an earlier preparation with another share.
        bin_path(corpus / split / domain).unlink(missing_ok=True)
        idx_path(corpus / split / domain).unlink(missing_ok=True)
    progress(stage, len(parts), len(parts))
    return Merged(files, dict(sources), read)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
