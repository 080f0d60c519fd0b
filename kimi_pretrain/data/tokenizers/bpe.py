"""A byte-level BPE trained on the corpus it will read, stored as one ``tokenizer.json``."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.tokenizers.pattern import K2_PATTERN
from kimi_pretrain.data.tokenizers.pieces import PieceTable

END_OF_DOCUMENT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
SMALLEST_VOCABULARY = 257  # every byte, and the end of a document
# The library takes about 140 bytes of memory for a character while it encodes.
PIECE_CHARACTERS = 1 << 18
GROUP_CHARACTERS = 1 << 22


class BpeTokenizer(PieceTable):
    """Encode with a byte-level BPE in the format of the `tokenizers` library.

    Any byte-level ``tokenizer.json`` with all bytes, an ``<|endoftext|>`` token and no
    normaliser serves, not only those that ``train`` wrote. Raises ConfigError if the file is
    absent or of another kind: what is read here gives every text back.
    """

    def __init__(self, path: Path) -> None:
        file = path / FILE_NAME if path.is_dir() else path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                "BPE tokenizer file",
                str(file),
                f"it must be readable ({error.strerror})",
                "data.tokenizer.path=<a tokenizer.json>",
            ) from error
        self._fingerprint = hashlib.sha256(data).hexdigest()
        self._tokenizer = _parse(data, file)
        # A file may ask for both; a corpus wants every token and no more.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A special token's name inside a text is text: a corpus must not end documents by itself.
        self._tokenizer.encode_special_tokens = True
        self._has_k2_split = (
            self._tokenizer.pre_tokenizer.__getstate__() == _k2_split().__getstate__()
        )
        self._eod_id = _end_of_document(self._tokenizer, file)
        super().__init__(_pieces(self._tokenizer, file))

    @property
    def eod_id(self) -> int:
        """Id of ``<|endoftext|>``."""
        return self._eod_id

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate, which no UTF-8 text holds."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores unless TOKENIZERS_PARALLELISM=false."""
        result: list[list[int]] = [[] for _ in texts]
        for group in _groups(texts, PIECE_CHARACTERS if self._has_k2_split else None):
            pieces = [piece for _, piece in group]
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            for (index, _), encoding in zip(group, encodings, strict=True):
                result[index] += encoding.ids
        return result

    def fingerprint(self) -> str:
        """SHA-256 of ``tokenizer.json``."""
        return self._fingerprint


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE with K2's split pattern; returns the bytes of ``tokenizer.json``.

    Same texts in the same order give the same bytes: the alphabet is fixed to the 256
    bytes, and ties between merges are broken by id. Id 0 is ``<|endoftext|>``. Raises
    ConfigError if ``vocab_size`` is below 257 or the texts are too few to fill it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            "vocabulary of a byte-level BPE",
            vocab_size,
            "256 bytes and <|endoftext|> need 257 ids",
            f"{SMALLEST_VOCABULARY} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _k2_split()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise ConfigError(
            "vocabulary of a BPE trained here",
            vocab_size,
            f"the sample has merges for {reached} tokens only",
            f"more text, or a vocabulary of {reached} or less",
        )
    text: str = tokenizer.to_str(pretty=True)
    return text.encode("utf-8")


def byte_alphabet() -> dict[str, int]:
    """Letter of byte-level BPE -> byte.

    GPT-2's convention: printable Latin-1 stands for itself, the other 68 bytes follow in
    order from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    letters = {chr(value): value for value in printable}
    letters.update({chr(0x100 + index): value for index, value in enumerate(others)})
    return letters


def cut_at_lines(text: str, characters: int) -> Iterator[str]:
    """Cut a text into pieces of about so many characters, where K2's pattern cuts anyway.

    No match of the pattern goes on from a newline to what is not white space, nor does one
    before that place depend on what follows it; so the pieces' ids are the text's.
    """
    start = 0
    while len(text) - start > characters:
        border = _LINE_START.search(text, start + characters)
        if border is None:
            break
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]


_LINE_START = re.compile(r"\n(?=\S)")


def _groups(texts: Sequence[str], characters: int | None) -> Iterator[list[tuple[int, str]]]:
    """(index of the text, piece of it) in groups that fit into memory together."""
    group: list[tuple[int, str]] = []
    size = 0
    for index, text in enumerate(texts):
        text.encode("utf-8")
        for piece in [text] if characters is None else cut_at_lines(text, characters):
            group.append((index, piece))
            size += len(piece)
            if size >= GROUP_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _k2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(K2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _parse(data: bytes, file: Path) -> Tokenizer:
    try:
        content = json.loads(data)
        kinds = content["model"]["type"], content["decoder"]["type"]
        normalizer, letters = content["normalizer"], content["model"]["vocab"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(file, "it must be JSON written by the tokenizers library") from error
    if kinds != ("BPE", "ByteLevel"):
        raise _unusable(file, f"model and decoder must be BPE and ByteLevel, they are {kinds}")
    if normalizer is not None:
        raise _unusable(file, "a normaliser would change the text, it must be null")
    if not letters >= byte_alphabet().keys():
        raise _unusable(file, "its vocabulary must hold all 256 bytes")
    return Tokenizer.from_str(data.decode("utf-8"))


def _end_of_document(tokenizer: Tokenizer, file: Path) -> int:
    index = tokenizer.token_to_id(END_OF_DOCUMENT)
    if index is None:
        raise _unusable(file, f"it must have the token {END_OF_DOCUMENT}")
    return index


def _pieces(tokenizer: Tokenizer, file: Path) -> list[bytes]:
    special = tokenizer.get_added_tokens_decoder()
    alphabet = byte_alphabet()
    pieces = [b""] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if index >= len(pieces) or not alphabet.keys() >= set(token):
            raise _unusable(file, f"token {token!r}, id {index}, must be byte-level and in range")
        pieces[index] = bytes(alphabet[letter] for letter in token)
    return pieces


def _unusable(file: Path, rule: str) -> ConfigError:
    return ConfigError(
        "BPE tokenizer file", str(file), rule, "a tokenizer.json of `kimi-pretrain data prepare`"
    )
