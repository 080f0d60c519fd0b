"""Whether prepared files are what their manifest says, and what Megatron can read."""

from pathlib import Path

import numpy as np

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data import manifest as manifests
from kimi_pretrain.data.indexed import IndexedReader, bin_path, idx_path
from kimi_pretrain.data.manifest import DomainRecord, FilesRecord, Manifest
from kimi_pretrain.data.merge import SPLITS, sha256
from kimi_pretrain.data.progress import Progress, silent
from kimi_pretrain.data.tokenizer_protocol import Tokenizer
from kimi_pretrain.data.tokenizers import load_tokenizer

CHUNK = 1 << 22  # tokens looked at together


def verify(path: Path, progress: Progress = silent) -> list[str]:
    """Every defect of a corpus directory, or of one prefix, as a line of text.

    With a manifest: the tokenizer's hash, then for each pair of files existence, SHA-256,
    layout, counts, token range, the end of every document, and whether the tokens stand for
    as many bytes of text as were read. Without one: layout and index alone.
    """
    try:
        if path.is_dir():
            corpus, manifest = path, manifests.read(path)
            prefixes = list(manifest.files())
        else:
            found = manifests.find(path)
            if found is None:
                IndexedReader(path).verify()
                return []
            corpus, manifest = found
            prefixes = [path.relative_to(corpus).as_posix()]
    except ConfigError as error:
        return [str(error)]
    tokenizer, defects = _tokenizer(corpus, manifest)
    for done, prefix in enumerate(prefixes):
        progress("verify", done, len(prefixes))
        defects += check_files(corpus, manifest.files()[prefix], tokenizer)
    progress("verify", len(prefixes), len(prefixes))
    if path.is_dir():
        for name, domain in manifest.domains.items():
            defects += check_sums(name, domain)
        defects += _strangers(corpus, manifest)
    return defects


def check_files(corpus: Path, record: FilesRecord, tokenizer: Tokenizer | None) -> list[str]:
    """Defects of one pair of files; without a tokenizer, hashes, layout and counts alone."""
    prefix = corpus / record.prefix
    try:
        reader = IndexedReader(prefix)
        reader.verify()
    except ConfigError as error:
        return [str(error)]
    defects = []
    hashes = ((bin_path(prefix), record.bin_sha256), (idx_path(prefix), record.idx_sha256))
    for path, expected in hashes:
        actual = sha256(path)
        if actual != expected:
            defects.append(f"{path}: SHA-256 is {actual}, the manifest says {expected}")
    counts = (
        ("documents", len(reader), record.documents),
        ("tokens", reader.total_tokens, record.tokens),
    )
    for what, number, told in counts:
        if number != told:
            defects.append(f"{prefix}: {number} {what}, the manifest says {told}")
    if tokenizer is not None:
        defects += _check_tokens(reader, record, tokenizer)
    return defects


def check_sums(name: str, domain: DomainRecord) -> list[str]:
    """Whether every document read is kept, a duplicate, or empty: none may go missing."""
    kept = domain.train.documents + (domain.heldout.documents if domain.heldout else 0)
    told = kept + domain.input.duplicates + domain.input.empty
    defects = []
    if told != domain.input.documents:
        defects.append(
            f"domain {name}: {domain.input.documents} documents were read, but kept, duplicate "
            f"and empty ones add up to {told}"
        )
    of_sources = sum(source.documents for source in domain.sources.values())
    if of_sources != kept:
        defects.append(f"domain {name}: {kept} documents kept, {of_sources} told by source")
    return defects


def _check_tokens(reader: IndexedReader, record: FilesRecord, tokenizer: Tokenizer) -> list[str]:
    prefix, vocabulary, end = reader.prefix, tokenizer.vocab_size, tokenizer.eod_id
    byte_lengths = tokenizer.byte_lengths()
    text_bytes = ends = 0
    for first in range(0, reader.total_tokens, CHUNK):
        tokens = reader.tokens[first : first + CHUNK]
        outside = (tokens < 0) | (tokens >= vocabulary)
        if outside.any():
            bad = int(np.argmax(outside))
            return [
                f"{bin_path(prefix)}: token {first + bad} is {int(tokens[bad])}, "
                f"the vocabulary is 0 to {vocabulary - 1}"
            ]
        text_bytes += int(byte_lengths[tokens].sum())
        ends += int((tokens == end).sum())
    defects = []
    if text_bytes != record.bytes:
        defects.append(
            f"{prefix}: its tokens stand for {text_bytes} bytes of text, "
            f"the manifest says {record.bytes}"
        )
    if ends != len(reader):
        defects.append(f"{prefix}: {ends} end-of-document tokens in {len(reader)} documents")
    for first in range(0, len(reader), CHUNK):
        after = np.arange(first + 1, min(first + CHUNK, len(reader)) + 1)
        last = reader.starts(after) - 1
        wrong = reader.tokens[last] != end
        if wrong.any():
            bad = first + int(np.argmax(wrong))
            defects.append(f"{prefix}: document {bad} does not end with token {end}")
            break
    return defects


def _tokenizer(corpus: Path, manifest: Manifest) -> tuple[Tokenizer | None, list[str]]:
    record = manifest.tokenizer
    try:
        tokenizer = load_tokenizer(TokenizerConfig(record.kind, record.file), corpus)
    except ConfigError as error:
        return None, [str(error)]
    facts = (
        ("fingerprint", tokenizer.fingerprint(), record.fingerprint),
        ("vocabulary", tokenizer.vocab_size, record.vocab_size),
        ("end of document", tokenizer.eod_id, record.eod_id),
    )
    wrong = [
        f"tokenizer of {corpus}: its {what} is {actual}, the manifest says {told}"
        for what, actual, told in facts
        if actual != told
    ]
    # A tokenizer that is not the corpus's own says nothing about the tokens.
    return (None, wrong) if wrong else (tokenizer, [])


def _strangers(corpus: Path, manifest: Manifest) -> list[str]:
    known = {str(corpus / prefix) for prefix in manifest.files()}
    return [
        f"{path}: the manifest does not know it; its preparation was stopped, or it was added"
        for split in SPLITS
        for path in sorted((corpus / split).glob("*.bin"))
        if str(path.with_suffix("")) not in known
    ]
