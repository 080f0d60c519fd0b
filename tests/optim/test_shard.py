"""One shard of a bucket: row factors on whatever part a rank holds, and its norm."""

from typing import Any

import pytest
import torch

from kimi_pretrain.optim import shard as module
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
        shard = Shard(buffers, group, 1, SETTINGS)
        (_, named) = named_ranges(bucket, 0)
        shard.scale_rows(named, factors)
        pieces.append(shard.master)
    whole = torch.cat(pieces)
    assert torch.equal(whole[:3], torch.ones(3, dtype=torch.float64))
    got = whole[3:elements].view(ROWS, COLS)
    assert torch.equal(got, factors[:, None].expand(ROWS, COLS))


def test_a_norm_in_blocks_is_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sum of norms in place of squares, and a last block that is left out."""
    monkeypatch.setattr(module, "NORM_ELEMENTS", 7)
    slots = (Slot(Spec("b.weight", (ROWS, COLS), True, False), 0),)
    bucket = Bucket("dp", 1, "flat", slots, ROWS * COLS, owners=((0,),))
    buffers = BucketBuffers(bucket, alone := Group("dp"), torch.bfloat16, torch.device("cpu"))
    buffers.gradients.copy_(torch.arange(1.0, 1 + ROWS * COLS))
    n = ROWS * COLS
    assert float(Shard(buffers, alone, 1, SETTINGS).squared_norm()) == pytest.approx(
        n * (n + 1) * (2 * n + 1) / 6, rel=1e-14
    )
