"""The names a configuration may choose are those that something is registered under."""

from kimi_pretrain.config import names
from kimi_pretrain.data.tokenizers import KINDS
from kimi_pretrain.data.tokenizers.bytes import ByteTokenizer
from kimi_pretrain.telemetry.sinks import SINKS


def test_sinks() -> None:
    """Catches a sink that exists but cannot be chosen, or the reverse."""
    assert set(names.SINKS) == set(SINKS)


def test_tokenizers() -> None:
    """Catches a tokenizer that exists but cannot be chosen, or the reverse."""
    assert set(names.TOKENIZERS) == set(KINDS)
    assert ByteTokenizer().vocab_size == names.BYTES_VOCABULARY
