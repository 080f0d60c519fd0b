"""The three readers of benchmarks.data_reading, each an endless source of shuffled batches.

All read samples of 4,097 tokens in shuffled order and give int64 tensors: two of
[batch, 4096], tokens and labels, here and from torchdata's batched fetch; one of
[batch, 4097] from torchdata and mosaicml-streaming as they are commonly used, which is less
work and leaves the cut to the training step. All run without worker processes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTH = 4096
TOKEN = np.dtype("<i4")
Batches = Iterator[torch.Tensor]


def ours(root: Path, samples: int, batch: int, document_mask: bool = False) -> Batches:
    from kimi_pretrain.config.schema import DataConfig
    from kimi_pretrain.data.batches import TrainStream
    from kimi_pretrain.data.prepared import DomainFiles, PreparedData

    tokenizer: Any = None  # reading needs no tokenizer
    prepared = PreparedData(tokenizer, {"text": DomainFiles(root / "tokens")})
    config = DataConfig(
        name="benchmark", root=".", sequence_length=LENGTH, document_mask=document_mask
    )
    stream = TrainStream(prepared, config, seed=0)
    assert stream.windows["text"].count == samples
    first = 0
    while True:
        read = stream.read(first, batch)
        first += batch
        torch.from_numpy(read.labels)
        yield torch.from_numpy(read.tokens)


def ours_masked(root: Path, samples: int, batch: int) -> Batches:
    return ours(root, samples, batch, document_mask=True)


class MapDataset(torch.utils.data.Dataset[torch.Tensor]):
    """The usual map-style dataset over a memory map, one sample at a time."""

    def __init__(self, root: Path, samples: int) -> None:
        self.tokens = np.memmap(root / "tokens.bin", TOKEN, mode="r")
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * LENGTH
        return torch.from_numpy(self.tokens[start : start + LENGTH + 1].astype(np.int64))


class BatchedDataset(MapDataset):
    """torchdata tuned by us: torch's hook for whole batches, one gather and no collation."""

    def __init__(self, root: Path, samples: int) -> None:
        super().__init__(root, samples)
        size = self.tokens.itemsize
        self.rows = np.lib.stride_tricks.as_strided(
            self.tokens.view(np.ndarray), (samples, LENGTH + 1), (LENGTH * size, size)
        )

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows[indices]
        tokens, labels = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def torchdata(root: Path, samples: int, batch: int) -> Batches:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return iter(StatefulDataLoader(MapDataset(root, samples), batch_size=batch, shuffle=True))


def torchdata_batched(root: Path, samples: int, batch: int) -> Batches:
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = BatchedDataset(root, samples)
    loader = StatefulDataLoader(
        dataset, batch_size=batch, shuffle=True, collate_fn=lambda pair: pair
    )
    for tokens, _labels in loader:
        yield tokens


def mosaic(root: Path, samples: int, batch: int) -> Batches:
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        local=str(root / "mds"), shuffle=True, batch_size=batch, num_canonical_nodes=1
    )
    assert dataset.size == samples
    for read in torch.utils.data.DataLoader(dataset, batch_size=batch):
        yield read["tokens"].to(torch.int64)


READERS: dict[str, Callable[[Path, int, int], Batches]] = {
    "kimi_pretrain": ours,
    "kimi_pretrain, document masks": ours_masked,
    "torchdata": torchdata,
    "torchdata, batched fetch": torchdata_batched,
    "mosaicml-streaming": mosaic,
}
