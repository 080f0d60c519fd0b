"""The half that every tokenizer shares: ids back to bytes."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int] | NDArray[np.integer[Any]]


class PieceTable:
    """Bytes of every id; a special token's are empty, so that decoding gives text alone."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._pieces)

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of some ids. Raises IndexError for an id outside [0, vocab_size)."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if len(listed) and min(listed) < 0:
            raise IndexError(f"token id {min(listed)} is negative")
        return b"".join([self._pieces[i] for i in listed])

    def decode(self, ids: Ids) -> str:
        """Text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def _byte_lengths(self) -> NDArray[np.int64]:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text each id stands for, [vocab_size]; 0 for special tokens."""
        return self._byte_lengths.copy()
