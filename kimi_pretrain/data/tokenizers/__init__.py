"""Text to token ids: the kinds of tokenizer a configuration can name.

All are lossless, and none runs code that came with a file. The classes load lazily: a run
on bytes never imports `tokenizers` or `tiktoken`.
"""

from collections.abc import Callable
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data.tokenizer_protocol import Tokenizer
from kimi_pretrain.data.tokenizers.bytes import ByteTokenizer

DEFAULT_VOCABULARY = 2048  # of a BPE trained here


def _bpe(path: Path) -> Tokenizer:
    from kimi_pretrain.data.tokenizers.bpe import BpeTokenizer

    return BpeTokenizer(path)


def _tiktoken(path: Path) -> Tokenizer:
    from kimi_pretrain.data.tokenizers.tiktoken_file import TiktokenFileTokenizer

    return TiktokenFileTokenizer(path)


# Kinds that read a file: configuration name -> (file's name in a corpus, constructor).
FILE_KINDS: dict[str, tuple[str, Callable[[Path], Tokenizer]]] = {
    "bpe": ("tokenizer.json", _bpe),
    "tiktoken": ("tiktoken.model", _tiktoken),
}
KINDS = ("bytes", *FILE_KINDS)


def check_kind(kind: str) -> None:
    """Raises ConfigError, with the closest name, for a kind that does not exist."""
    if kind not in KINDS:
        raise ConfigError(
            "data.tokenizer.kind",
            kind,
            f"it is one of {', '.join(KINDS)}",
            nearest_name(kind, KINDS),
        )


def load_tokenizer(cfg: TokenizerConfig, root: Path) -> Tokenizer:
    """Open the tokenizer a configuration names; a relative ``cfg.path`` starts at ``root``.

    Raises ConfigError for an unknown kind, a missing path, a file that is not one, or a
    BPE whose vocabulary is not ``cfg.vocab_size`` where that is given.
    """
    check_kind(cfg.kind)
    if cfg.kind == "bytes":
        return ByteTokenizer()
    file_name, open_file = FILE_KINDS[cfg.kind]
    if cfg.path is None:
        raise ConfigError(
            "data.tokenizer.path",
            None,
            f"a tokenizer of kind {cfg.kind} reads a file",
            f"data.tokenizer.path=<a {file_name}, or the directory that holds it>",
        )
    tokenizer = open_file(root / Path(cfg.path).expanduser())
    if cfg.kind == "bpe" and cfg.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            "data.tokenizer.vocab_size",
            cfg.vocab_size,
            f"the {file_name} at {cfg.path} has {tokenizer.vocab_size} ids",
            f"data.tokenizer.vocab_size={tokenizer.vocab_size}, or null",
        )
    return tokenizer
