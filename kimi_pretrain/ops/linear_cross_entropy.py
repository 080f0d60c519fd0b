"""Cross entropy of a linear head whose logits never exist at once.

K2's vocabulary has 163,840 entries: the logits of 4,096 tokens would take 2.7 GB in fp32.
They are computed in tiles of a fixed number of elements:

- A vocabulary that fits a tile for some hundreds of tokens is taken whole, for that many
  tokens at a time. Both gradients are computed in forward, while a tile is in the cache, and
  kept: backward is one scaling, and nothing is computed twice.
- A larger one is cut. Forward goes over its tiles for every token's log-sum-exp (online,
  arXiv 1805.02867), backward computes them again for the gradients from it. Kept are the
  hidden states and a number a token. K2's gradient of the weight, 2.3 GB in bf16, exists
  nowhere but in ``main_grad``, and the products are as many as if forward computed it
  (docs/decisions/0005-the-heads-gradients.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.main_grad import deliver, delivered, main_gradient
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.ops.saved import named

IGNORED = -100  # a label that takes no part in the loss

# Logits that exist at once: 8 MiB in bf16, 16 MiB in fp32, about a core's share of a last
# level cache, and enough rows for a matrix product at full speed.
TILE_ELEMENTS = 2**22
# Fewer tokens than this a tile, and the vocabulary is cut instead.
_MIN_TOKENS = 256
# Logits widened to fp32 at a time: 512 KiB, so that they stay in a core's own cache.
_BLOCK_ELEMENTS = 2**17
# An accelerator has no such cache, and each tile costs it some twenty launches: tiles so much
# larger (64 MiB in bf16), widened whole.
_ACCELERATOR_TILES = 8


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
        denominator: of the sum; by default the number of labels that take part (1 where
            none does).
        tile_elements: logits that may exist at once.

    Returns:
        Scalar in fp32 (fp64 for fp64), as are all sums over the vocabulary and over tiles.
    """
    if denominator is None:
        denominator = max(1, int((labels != IGNORED).sum()))
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, labels, denominator, tile_elements, differentiable
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        denominator: int,
        tile_elements: int,
        differentiable: bool,
    ) -> Tensor:
        problem = _Problem.of(hidden, weight, labels, 1.0 / denominator)
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        whole = tile_elements >= vocabulary * min(tokens, _MIN_TOKENS)
        elements = tile_elements * (1 if _on_cpu(hidden) else _ACCELERATOR_TILES)
        step = max(1, elements // (vocabulary if whole else tokens))
        # The weight not through save_for_backward: it would come back without its attributes.
        ctx.weight, ctx.scale, ctx.step = weight, problem.scale, None if whole else step
        # Every saved tensor has a tag (ops/saved.py); the hidden states have the norm's.
        if whole:
            losses, gradients = _whole_vocabulary(problem, step, differentiable)
            if gradients is not None:
                named("head", *gradients)
                ctx.save_for_backward(*gradients)
        else:
            losses, lse = _cut_losses(problem, step)
            if differentiable:
                named("head", labels, lse)
                ctx.save_for_backward(hidden, labels, lse)
        return torch.dot(losses, problem.valid) * problem.scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight: Tensor = ctx.weight
        if ctx.step is None:
            grad_hidden, grad_weight = ctx.saved_tensors
            grad_hidden, grad = grad_hidden * grads[0], deliver(weight, grad_weight * grads[0])
        else:
            hidden, labels, lse = ctx.saved_tensors
            problem = _Problem.of(hidden, weight, labels, ctx.scale)
            grad_hidden, grad = _cut_gradients(problem, lse, ctx.step, grads[0])
        return grad_hidden, grad, None, None, None, None


@dataclass(frozen=True)
class _Problem:
    hidden: Tensor  # [tokens, width]
    weight: Tensor  # [vocabulary, width]
    targets: Tensor  # [tokens], 0 where ignored
    valid: Tensor  # [tokens] 1 or 0, in the dtype of sums
    scale: float  # of the sum of losses

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> "_Problem":
        valid = labels != IGNORED
        wide = valid.to(accumulate_dtype(hidden.dtype))
        return cls(hidden, weight, torch.where(valid, labels, 0), wide, scale)


_Result = tuple[Tensor, tuple[Tensor, Tensor] | None]  # losses [tokens], gradients if wanted


def _whole_vocabulary(problem: _Problem, step: int, differentiable: bool) -> _Result:
    """``step`` tokens at a time: logits, their softmax, and both gradients from it."""
    hidden, weight, valid = problem.hidden, problem.weight, problem.valid
    losses = torch.empty_like(valid)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=valid.dtype)
    memory = hidden.new_empty(min(step, hidden.shape[0]), weight.shape[0])
    for rows in _slices(hidden.shape[0], step):
        tile = memory[: rows.stop - rows.start]  # [step, vocabulary]
        torch.mm(hidden[rows], weight.t(), out=tile)
        each = torch.arange(tile.shape[0], device=tile.device)
        own = tile[each, problem.targets[rows]].to(valid.dtype)
        lse = torch.empty_like(own)
        for block in _blocks(tile):
            probabilities, lse[block] = _softmax(tile[block])
            if differentiable:
                tile[block] = probabilities
        losses[rows] = lse - own
        if differentiable:
            # Softmax minus one at the target, before rounding: 0.999 - 1 in bf16 is not -0.001.
            tile[each, problem.targets[rows]] = torch.expm1(own - lse).to(tile.dtype)
            counted = valid[rows, None]
            grad_hidden[rows] = torch.mm(tile, weight).to(valid.dtype) * (counted * problem.scale)
            grad_weight += torch.mm(tile.t(), hidden[rows] * counted.to(hidden.dtype))
    if not differentiable:
        return losses, None
    return losses, (grad_hidden, grad_weight.mul_(problem.scale).to(weight.dtype))


def _cut_losses(problem: _Problem, step: int) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps [tokens], ``step`` entries of the vocabulary at a time."""
    hidden, weight, valid = problem.hidden, problem.weight, problem.valid
    lse = torch.full_like(valid, -torch.inf)
    own = torch.zeros_like(valid)  # the target's logit
    for columns in _slices(weight.shape[0], step):
        tile = torch.mm(hidden, weight[columns].t())  # [tokens, step]
        rows, local = _targets_within(problem.targets, columns)
        own[rows] = tile[rows, local].to(own.dtype)
        for block in _blocks(tile):
            lse[block] = torch.logaddexp(lse[block], _softmax(tile[block])[1])
    return lse - own, lse


def _cut_gradients(
    problem: _Problem, lse: Tensor, step: int, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of hidden states and weight times ``grad`` (scalar).

    That of the weight is added to its main gradient tile by tile; without one it is returned.
    """
    hidden, weight, valid = problem.hidden, problem.weight, problem.valid
    factor = problem.scale * grad
    counted = hidden * valid[:, None].to(hidden.dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=valid.dtype)
    main = main_gradient(weight)
    grad_weight = torch.zeros_like(weight) if main is None else main
    for columns in _slices(weight.shape[0], step):
        tile = torch.mm(hidden, weight[columns].t())  # [tokens, step]
        rows, local = _targets_within(problem.targets, columns)
        own = tile[rows, local].to(lse.dtype)
        for block in _blocks(tile):
            tile[block] = torch.exp(tile[block] - lse[block, None])
        # Softmax minus one at the target, before rounding: 0.999 - 1 in bf16 is not -0.001.
        tile[rows, local] = torch.expm1(own - lse[rows]).to(tile.dtype)
        grad_hidden += torch.mm(tile, weight[columns])
        grad_weight[columns].add_(torch.mm(tile.t(), counted).to(valid.dtype) * factor)
    grad_hidden.mul_(valid[:, None] * factor)
    if main is not None:
        delivered(weight)
    return grad_hidden.to(hidden.dtype), grad_weight if main is None else None


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp of rows of logits, in the dtype of sums.

    The log-sum-exp comes from the largest probability, which is at least one over the
    vocabulary: one exponential serves both.
    """
    probabilities = torch.softmax(logits, dim=1, dtype=accumulate_dtype(logits.dtype))
    lse = logits.amax(dim=1).to(probabilities.dtype) - probabilities.amax(dim=1).log_()
    return probabilities, lse


def _slices(length: int, step: int) -> Iterator[slice]:
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def _blocks(tile: Tensor) -> Iterator[slice]:
    """Rows of a tile that are widened together."""
    rows = tile.shape[0]
    return _slices(rows, max(1, _BLOCK_ELEMENTS // tile.shape[1]) if _on_cpu(tile) else rows)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _targets_within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Tokens whose target lies in a tile, and its column there."""
    rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero()[:, 0]
    return rows, targets[rows] - columns.start
