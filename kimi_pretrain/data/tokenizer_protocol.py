"""What the rest of the program asks of a tokenizer, whatever its kind."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back; ids lie in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        ...

    @property
    def eod_id(self) -> int:
        """Id that ends every document in a prepared file."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token; a special token's name is plain text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, the same as ``encode`` one by one."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of some ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> bytes:
        """Bytes of some ids, exact where ``decode`` must replace; special tokens give none."""
        ...

    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text each id stands for, [vocab_size]; 0 for special tokens.

        Turns nats a token into bits a byte: loss x tokens / (ln 2 x bytes of the labels).
        """
        ...

    def fingerprint(self) -> str:
        """Hash of everything that decides the ids; equal exactly when the ids are equal."""
        ...
