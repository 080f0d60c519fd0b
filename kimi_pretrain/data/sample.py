"""A sample of the input to train a tokenizer on, and that training."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kimi_pretrain.data.documents import Document, Unit
from kimi_pretrain.data.merge import held_out
from kimi_pretrain.data.parts import digest
from kimi_pretrain.data.progress import Progress, silent
from kimi_pretrain.data.readers import read
from kimi_pretrain.data.tokenizers import bpe

MOST_UNITS = 256  # read from, evenly spread over a large input


def sample(units: Sequence[Unit], size: int, heldout: float, dedup: str) -> Iterator[str]:
    """About `size` bytes of training documents, from units spread evenly over the input.

    Held-out documents are left out: merges must not know them either. The same input gives
    the same sample.
    """
    stride = max(1, -(-len(units) // MOST_UNITS))
    chosen = units[::stride]
    given = 0
    for index, unit in enumerate(chosen):
        # What a small unit could not give, those after it may.
        until = size * (index + 1) // len(chosen)
        for item in read(unit):
            if given >= until:
                break
            if isinstance(item, Document) and item.text.strip():
                key = np.frombuffer(digest(item.text, dedup), dtype="<u8").reshape(1, 2)
                if not held_out(key, heldout)[0]:
                    given += len(item.text.encode())
                    yield item.text


def train_bpe(
    file: Path,
    units: Mapping[str, Sequence[Unit]],
    sizes: Mapping[str, int],
    vocab_size: int,
    heldout: float,
    dedup: str,
    progress: Progress = silent,
) -> None:
    """Train a BPE on `sizes[domain]` bytes of each domain and write `file` in one step.

    Raises ConfigError if the sample cannot fill the vocabulary.
    """
    total = sum(sizes.values())

    def texts() -> Iterator[str]:
        seen = 0
        for domain, listed in units.items():
            for text in sample(listed, sizes[domain], heldout, dedup):
                yield text
                seen += len(text)
                progress("train tokenizer", min(seen, total - 1), total)

    data = bpe.train(texts(), vocab_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(file)
    progress("train tokenizer", total, total)
