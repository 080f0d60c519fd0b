"""What a prepared corpus says about itself: ``manifest.json`` beside ``train/`` and ``heldout/``.

    <corpus>/manifest.json
    <corpus>/tokenizer/tokenizer.json | tiktoken.model      (nothing for bytes)
    <corpus>/train/<domain>.bin, .idx
    <corpus>/heldout/<domain>.bin, .idx

It holds no times and no host names: equal input gives equal bytes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kimi_pretrain.config.errors import ConfigError

FILE_NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class TokenizerRecord:
    """What made the ids; ``file`` is relative to the corpus, None for bytes."""

    kind: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    file: str | None


@dataclass(frozen=True)
class FilesRecord:
    """One pair of token files; ``prefix`` is relative to the corpus, ``bytes`` is UTF-8 text."""

    prefix: str
    documents: int
    tokens: int
    bytes: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """Where documents came from, under which licence, and how many were kept."""

    license: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class InputRecord:
    """Everything that was read. documents = kept + duplicates + empty; skipped gave none."""

    documents: int = 0
    bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    repaired: int = 0  # had bytes that are not UTF-8, each now U+FFFD
    skipped: int = 0  # bad records and files left out by --bad-input skip
    ignored_files: int = 0  # files of directories whose suffix is not known as text


@dataclass(frozen=True)
class DomainRecord:
    """One domain: its files, its sources, its input, and the options that shaped it."""

    train: FilesRecord
    heldout: FilesRecord | None
    sources: Mapping[str, SourceRecord]
    input: InputRecord
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``."""

    tokenizer: TokenizerRecord
    domains: Mapping[str, DomainRecord]
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, FilesRecord]:
        """Every pair of token files by its prefix, training before held-out."""
        pairs = [
            files
            for domain in self.domains.values()
            for files in (domain.train, domain.heldout)
            if files is not None
        ]
        return {files.prefix: files for files in pairs}


def write(corpus: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step; a reader sees the old one or the new one."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2, ensure_ascii=False) + "\n"
    temporary = corpus / f".{FILE_NAME}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(corpus / FILE_NAME)


def read(corpus: Path) -> Manifest:
    """Read a corpus's manifest. Raises ConfigError if it is absent, foreign or incomplete."""
    path = corpus / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"]
    except OSError as error:
        raise _unusable(path, f"it must be readable ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(path, "it must be the JSON that `kimi-pretrain data prepare` wrote") from (
            error
        )
    if known != FORMAT:
        raise _unusable(path, f"format {known} is not the {FORMAT} this version reads")
    try:
        return Manifest(
            tokenizer=TokenizerRecord(**content["tokenizer"]),
            domains={name: _domain(value) for name, value in content["domains"].items()},
            recipe=content["recipe"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, f"a key is missing or unknown ({error})") from error


def find(prefix: Path) -> tuple[Path, Manifest] | None:
    """The corpus that a prefix belongs to, with its manifest; None for files without one."""
    for corpus in (prefix.parent, prefix.parent.parent):
        if (corpus / FILE_NAME).is_file():
            manifest = read(corpus)
            if any(corpus / name == prefix for name in manifest.files()):
                return corpus, manifest
    return None


def _domain(value: Mapping[str, Any]) -> DomainRecord:
    heldout = value["heldout"]
    return DomainRecord(
        train=FilesRecord(**value["train"]),
        heldout=None if heldout is None else FilesRecord(**heldout),
        sources={name: SourceRecord(**source) for name, source in value["sources"].items()},
        input=InputRecord(**value["input"]),
        options=value["options"],
    )


def _unusable(path: Path, rule: str) -> ConfigError:
    return ConfigError("manifest", str(path), rule, "kimi-pretrain data prepare, which rewrites it")
