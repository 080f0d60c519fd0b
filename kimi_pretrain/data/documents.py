"""What flows from files to tokens: units of input, documents, defects.

Bytes that are not UTF-8, and escaped lone surrogates in JSON, become U+FFFD and the
document is marked as repaired.
"""

from dataclasses import dataclass

from kimi_pretrain.config.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """A stretch of input that one worker reads alone, the same for any number of workers.

    ``reader`` is a key of ``READERS``. ``start`` and ``stop`` are bytes of a file of lines
    (a line belongs to the unit its first byte lies in) or row groups of a parquet file;
    ``stop`` None reads to the end. ``size`` is the input in bytes, for progress and balance.
    """

    reader: str
    paths: tuple[str, ...]
    size: int
    source: str = ""
    start: int = 0
    stop: int | None = None
    text_field: str = "text"


@dataclass(frozen=True)
class Document:
    """One text, valid Unicode; ``repaired`` if something in it had to become U+FFFD."""

    text: str
    repaired: bool = False


@dataclass(frozen=True)
class Defect:
    """A piece of input that gives no document; the four parts of a ConfigError."""

    what: str
    value: str
    rule: str
    fix: str

    def error(self) -> ConfigError:
        """The defect as the error that stops a run."""
        return ConfigError(self.what, self.value, self.rule, self.fix)


Item = Document | Defect


def valid_text(text: str) -> Document:
    """A document of a string that may hold lone surrogates, each of which becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        paired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Document(paired, repaired=True)
    return Document(text)


def decoded(data: bytes) -> Document:
    """A document of bytes that should be UTF-8; a byte order mark in front is not text."""
    try:
        return Document(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Document(data.decode("utf-8-sig", errors="replace"), repaired=True)
