"""What a prepared corpus holds, as a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kimi_pretrain.data import manifest as manifests
from kimi_pretrain.data.indexed import IndexedReader
from kimi_pretrain.data.manifest import DomainRecord, FilesRecord

HEADINGS = (
    *("domain", "split", "documents", "tokens", "bytes", "bytes/token"),
    *("median tokens", "longest"),
)


def corpus_lines(corpus: Path) -> Iterator[str]:
    """Lines about a corpus: tokenizer, a row for each pair of files, sources and losses.

    Raises ConfigError if the manifest or a file is absent or broken.
    """
    manifest = manifests.read(corpus)
    tokenizer = manifest.tokenizer
    yield f"{corpus}"
    yield (
        f"tokenizer {tokenizer.kind}, {tokenizer.vocab_size:,} ids, end of document "
        f"{tokenizer.eod_id}, fingerprint {tokenizer.fingerprint[:12]}"
    )
    yield ""
    rows = []
    for name, domain in manifest.domains.items():
        rows.append(_row(corpus, name, "train", domain.train))
        if domain.heldout is not None:
            rows.append(_row(corpus, name, "heldout", domain.heldout))
    yield from table(HEADINGS, rows)
    for name, domain in manifest.domains.items():
        yield ""
        yield f"{name}: {_left_out(domain)}"
        yield from table(
            ("  source", "licence", "documents", "bytes"),
            [
                (f"  {source}", record.license, f"{record.documents:,}", f"{record.bytes:,}")
                for source, record in domain.sources.items()
            ],
        )


def prefix_lines(prefix: Path) -> Iterator[str]:
    """Lines about one pair of files, as `data index` shows them: layout, counts, first entries.

    Raises ConfigError if the pair is absent or its layout is broken.
    """
    reader = IndexedReader(prefix)
    lengths = reader.lengths
    yield f"{prefix}"
    facts = [
        ("token type", reader.dtype.name),
        ("sequences", f"{reader.sequences:,}"),
        ("documents", f"{len(reader):,}"),
        ("tokens", f"{reader.total_tokens:,}"),
        ("modes", "no" if reader.modes is None else "yes"),
    ]
    if len(lengths):
        facts.append(
            (
                "tokens a document",
                f"{lengths.min():,} least, {int(np.median(lengths)):,} median, "
                f"{lengths.max():,} most",
            )
        )
    yield from (f"  {name:<20}{value}" for name, value in facts)
    for index in range(min(3, len(reader))):
        tokens = reader.doc(index)
        more = " ..." if len(tokens) > 8 else ""
        yield f"  {f'document {index}':<20}{' '.join(map(str, tokens[:8].tolist()))}{more}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows under headings, columns aligned: text to the left, numbers to the right."""
    everything = [headings, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(headings))]
    for row in everything:
        cells = [
            cell.rjust(width) if rows and _numeric(rows[0][column]) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _numeric(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdigit()


def _row(corpus: Path, domain: str, split: str, files: FilesRecord) -> tuple[str, ...]:
    lengths = IndexedReader(corpus / files.prefix).lengths
    return (
        domain,
        split,
        f"{files.documents:,}",
        f"{files.tokens:,}",
        f"{files.bytes:,}",
        f"{files.bytes / max(files.tokens, 1):.2f}",
        f"{int(np.median(lengths)) if len(lengths) else 0:,}",
        f"{int(lengths.max(initial=0)):,}",
    )


def _left_out(domain: DomainRecord) -> str:
    read = domain.input
    facts = [
        f"{read.documents:,} documents read",
        f"{read.duplicates:,} duplicates ({domain.options['dedup']})",
        f"{read.empty:,} empty",
        f"{read.repaired:,} with invalid UTF-8 (kept, U+FFFD)",
        f"{read.skipped:,} bad records skipped",
        f"{read.ignored_files:,} files ignored",
    ]
    return ", ".join(facts)
