"""Cross entropy of a linear head in tiles over the vocabulary.

K2's vocabulary has 163,840 entries: the logits of 4,096 tokens would take 2.7 GB in fp32,
more than the rest of the head together. Forward goes over tiles of the vocabulary with an
online log-sum-exp (arXiv 1805.02867); backward computes a tile's logits again. Where all
logits fit one tile, that tile is kept and nothing is computed twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.precision import accumulate_dtype

IGNORED = -100  # a label that takes no part in the loss

# Logits that may exist at once: 64 MiB in bf16, 128 MiB in fp32.
TILE_ELEMENTS = 2**25
# Logits widened to fp32 at a time: 1 MiB, so that they stay in a core's cache.
_BLOCK_ELEMENTS = 2**18


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    denominator: int | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> Tensor:
    """``sum_t -log softmax(hidden[t] @ weight.T)[labels[t]] / denominator``.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        labels: [tokens] int64; ``IGNORED`` (-100) takes no part.
        denominator: of the sum; by default the number of labels that take part (1 where none does).
        tile_elements: logits that may exist at once.

    Returns:
        Scalar in fp32 (fp64 for fp64), as are all reductions over the vocabulary.
    """
    if denominator is None:
        denominator = max(1, int((labels != IGNORED).sum()))
    return _LinearCrossEntropy.apply(hidden, weight, labels, denominator, tile_elements)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        denominator: int,
        tile_elements: int,
    ) -> Tensor:
        width = max(1, tile_elements // max(1, hidden.shape[0]))
        high = accumulate_dtype(hidden.dtype)
        lse = torch.full(labels.shape, -torch.inf, dtype=high, device=hidden.device)
        chosen = torch.zeros_like(lse)  # the label's own logit
        tile = None
        for first, rows in _tiles(weight, width):
            tile = torch.mm(hidden, rows.t())  # [tokens, tile]
            local, here = _local_labels(labels, first, rows.shape[0])
            chosen += torch.where(here, tile.gather(1, local[:, None])[:, 0].to(high), 0)
            for block in _blocks(tile):
                part = torch.logsumexp(tile[block].to(high), dim=1)
                lse[block] = torch.logaddexp(lse[block], part)
        valid = labels != IGNORED
        kept = tile if width >= weight.shape[0] else None
        ctx.save_for_backward(hidden, weight, labels, lse, kept)
        ctx.denominator, ctx.width = denominator, width
        return torch.where(valid, lse - chosen, 0).sum() / denominator

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, lse, kept = ctx.saved_tensors
        high = lse.dtype
        scale = grads[0].to(high) / ctx.denominator
        factor = torch.where(labels != IGNORED, scale, 0)[:, None]  # [tokens, 1]
        grad_hidden = torch.zeros(hidden.shape, dtype=high, device=hidden.device)
        grad_weight = torch.empty_like(weight)
        for first, rows in _tiles(weight, ctx.width):
            logits = kept if kept is not None else torch.mm(hidden, rows.t())  # [tokens, tile]
            grad = torch.empty_like(logits)
            local, here = _local_labels(labels, first, rows.shape[0])
            for block in _blocks(logits):
                wide = torch.sub(logits[block], lse[block, None]).exp_()  # probabilities
                wide.scatter_add_(1, local[block, None], -here[block, None].to(high))
                torch.mul(wide, factor[block], out=grad[block])
            grad_hidden += torch.mm(grad, rows)
            torch.mm(grad.t(), hidden, out=grad_weight[first : first + rows.shape[0]])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _tiles(weight: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """(first vocabulary entry, rows of the weight) of every tile."""
    for first in range(0, weight.shape[0], width):
        yield first, weight[first : first + width]


def _blocks(tile: Tensor) -> Iterator[slice]:
    """Rows of a tile that are widened together."""
    step = max(1, _BLOCK_ELEMENTS // tile.shape[1])
    for first in range(0, tile.shape[0], step):
        yield slice(first, first + step)


def _local_labels(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Labels as columns of a tile (0 where elsewhere), and whether they lie in the tile."""
    local = labels - first
    here = (local >= 0) & (local < width)
    return torch.where(here, local, 0), here
