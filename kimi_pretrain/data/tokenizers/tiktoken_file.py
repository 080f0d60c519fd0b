"""A vocabulary in tiktoken's format, as Kimi K2 ships it: lines of ``base64 rank``.

K2 has 163,584 such ranks (``tiktoken.model``) and 256 special ids behind them. The file
holds no code and none is run: split pattern and special ids are written here.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.tokenizers.pattern import K2_PATTERN
from kimi_pretrain.data.tokenizers.pieces import PieceTable

FILE_NAME = "tiktoken.model"
SPECIAL_COUNT = 256
# Offset behind the last rank -> name; in between lie <|reserved_token_N|>.
SPECIAL_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
END_OF_SEQUENCE = 1  # offset of [EOS], which ends a document

# Upstream cuts its input so, to bound the merge loop. The cuts change ids at their borders.
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000


class TiktokenFileTokenizer(PieceTable):
    """Encode with a tiktoken file, K2's split pattern and K2's special ids.

    Ids equal the released tokenizer's with special tokens disallowed, long inputs
    included. Raises ConfigError if the file is absent or malformed.
    """

    def __init__(self, path: Path) -> None:
        file = path / FILE_NAME if path.is_dir() else path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                "tiktoken file",
                str(file),
                f"it must be readable ({error.strerror})",
                "data.tokenizer.path=<tiktoken.model of a Kimi K2 release>",
            ) from error
        self._fingerprint = hashlib.sha256(data).hexdigest()
        ranks = parse_ranks(data, file)
        self.special_tokens = special_tokens(len(ranks))
        self._encoding = tiktoken.Encoding(
            name=file.name,
            pat_str=K2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        super().__init__([*ranks, *[b""] * SPECIAL_COUNT])

    @property
    def eod_id(self) -> int:
        """Id of ``[EOS]``."""
        return self.special_tokens[SPECIAL_NAMES[END_OF_SEQUENCE]]

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate, which no UTF-8 text holds."""
        # tiktoken would replace a lone surrogate without a word.
        text.encode("utf-8")
        ids: list[int] = []
        for piece in cut(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return self._fingerprint


def special_tokens(ranks: int) -> dict[str, int]:
    """Name -> id of the 256 special tokens behind a number of ranks, in K2's order."""
    return {
        SPECIAL_NAMES.get(offset, f"<|reserved_token_{ranks + offset}|>"): ranks + offset
        for offset in range(SPECIAL_COUNT)
    }


def parse_ranks(data: bytes, file: Path) -> dict[bytes, int]:
    """Bytes of every token -> rank, in order of rank.

    Raises ConfigError, with the line, unless the ranks are 0, 1, 2, ... of distinct tokens
    and every single byte has one: a text with a byte left out could not be encoded.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            in_order = int(rank) == number and token not in ranks
        except (ValueError, binascii.Error) as error:
            raise _malformed(file, number, line) from error
        if not in_order:
            raise _malformed(file, number, line)
        ranks[token] = number
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise ConfigError(
            "tiktoken file",
            str(file),
            f"it must have all 256 single bytes, 0x{missing[0]:02x} is missing",
            "the complete file of a Kimi K2 release",
        )
    return ranks


def cut(text: str, max_characters: int = MAX_CHARACTERS, max_run: int = MAX_RUN) -> Iterator[str]:
    """Cut a text as upstream does: every ``max_characters``, and inside runs of one kind.

    A run is a stretch of white space or of anything else; one longer than ``max_run``
    characters is cut after every ``max_run`` of them, counted anew after each cut.
    """
    # One pass in C over all runs that are short enough; it stops where a long one begins.
    short_runs = re.compile(rf"(?:\s{{1,{max_run}}}+(?!\s)|\S{{1,{max_run}}}+(?!\S))*+", re.UNICODE)
    for start in range(0, len(text), max_characters):
        stop = min(start + max_characters, len(text))
        while start < stop:
            match = short_runs.match(text, start, stop)
            end = match.end() if match else start
            end = stop if end == stop else end + max_run
            yield text[start:end]
            start = end


def _malformed(file: Path, number: int, line: bytes) -> ConfigError:
    return ConfigError(
        f"tiktoken file {file}, line {number + 1}",
        line[:60].decode("utf-8", errors="replace"),
        f"a line is a token in base64, not seen before, a space and its rank {number}",
        "the unchanged file of a Kimi K2 release",
    )
