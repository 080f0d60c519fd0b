"""UTF-8 bytes as tokens: nothing to train, nothing to load, every text in 257 ids."""

import hashlib
from collections.abc import Sequence

from kimi_pretrain.data.tokenizers.pieces import PieceTable


class ByteTokenizer(PieceTable):
    """Ids 0 to 255 are the bytes of UTF-8; 256 ends a document."""

    def __init__(self) -> None:
        super().__init__([*(bytes([value]) for value in range(256)), b""])

    @property
    def eod_id(self) -> int:
        """Id that ends every document."""
        return 256

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate, which no UTF-8 text holds."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """SHA-256 of the definition, which is this sentence."""
        return hashlib.sha256(b"0-255: the bytes of UTF-8; 256: end of document").hexdigest()
