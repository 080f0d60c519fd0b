"""One shard of a matrix: row factors on whatever part of it a rank holds."""

from typing import Any

import pytest
import torch

from kimi_pretrain.optim.buckets import Bucket, Slot, Spec
from kimi_pretrain.optim.buffers import BucketBuffers
from kimi_pretrain.optim.orthogonalize import coefficient_table
from kimi_pretrain.optim.piece import named_ranges
from kimi_pretrain.optim.settings import Settings
from kimi_pretrain.optim.shard import Shard
from kimi_pretrain.parallel.collectives import Group

ROWS, COLS = 5, 4
SETTINGS = Settings(
    0.1, 0.95, True, 0.2, (0.9, 0.95), 1e-8, coefficient_table("keller5"), torch.float64, None, None
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_row_factors_fit_wherever_a_shard_is_cut(ranks: int) -> None:
    """Catches factors of the neighbouring row where a shard begins or ends inside one."""
    first, second = ("a.weight", (1, 3)), ("b.weight", (ROWS, COLS))
    slots = (Slot(Spec(*first, True, False), 0), Slot(Spec(*second, True, False), 3))
    elements = 3 + ROWS * COLS
    size = -(-elements // ranks) * ranks
    bucket = Bucket("dp", ranks, "flat", slots, size, owners=((0, 0),))
    factors = torch.arange(2, 2 + ROWS, dtype=torch.float64)
    pieces = []
    for rank in range(ranks):
        process_group: Any = object()
        group = Group("dp", tuple(range(ranks)), rank, process_group)
        buffers = BucketBuffers(bucket, group, torch.float64, torch.device("cpu"))
        buffers.parameters.fill_(1.0)
        shard = Shard(buffers, 0, SETTINGS)
        (_, named) = named_ranges(bucket, 0)
        shard.scale_rows(named, factors)
        pieces.append(shard.master)
    whole = torch.cat(pieces)
    assert torch.equal(whole[:3], torch.ones(3, dtype=torch.float64))
    got = whole[3:elements].view(ROWS, COLS)
    assert torch.equal(got, factors[:, None].expand(ROWS, COLS))
