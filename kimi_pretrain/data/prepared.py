"""Tokens ready to be read: where each domain's files lie, and what made the ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.data.tokenizer_protocol import Tokenizer


@dataclass(frozen=True)
class DomainFiles:
    """Prefixes (path without ``.bin``/``.idx``) of one domain's token files."""

    train: Path
    heldout: Path | None = None


@dataclass(frozen=True)
class PreparedData:
    """A corpus: domains by name, in their order of appearance, and their tokenizer."""

    tokenizer: Tokenizer
    domains: Mapping[str, DomainFiles]
