"""Between token order and expert order: take rows out, bring (weighted) rows back."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.precision import accumulate_dtype


def take_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Row r of the result is the token of slot ``order[r]``.

    A slot is one choice of one token: slot ``t * k + j`` is token t's j-th expert.

    Args:
        x: [tokens, width].
        order: [tokens * k] slots in expert order.
        inverse: [tokens, k] where each slot went; the inverse permutation of ``order``.

    Returns:
        [tokens * k, width]. Backward adds a token's k rows in a fixed order, without atomics.
    """
    return _TakeRows.apply(x, order, inverse)  # type: ignore[no-any-return, no-untyped-call]


def weighted_rows(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``sum_j weights[t, j] * rows[inverse[t, j]]`` for every token t.

    Args:
        rows: [tokens * k, width] in expert order.
        weights: [tokens, k].
        order: as in ``take_rows``.
        inverse: as in ``take_rows``.

    Returns:
        [tokens, width] in the dtype of rows.
    """
    return _WeightedRows.apply(rows, weights, order, inverse)  # type: ignore[no-any-return, no-untyped-call]


def summed_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``sum_j rows[inverse[t, j]]`` for every token t: rows that carry their weights already.

    Args:
        rows: [tokens * k, width] in expert order.
        order: as in ``take_rows``.
        inverse: as in ``take_rows``.

    Returns:
        [tokens, width] in the dtype of rows, summed in fp32 (fp64).
    """
    return _SummedRows.apply(rows, order, inverse)  # type: ignore[no-any-return, no-untyped-call]


def reorder_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` for a permutation ``order`` [rows] and its inverse."""
    return _ReorderRows.apply(x, order, inverse)  # type: ignore[no-any-return, no-untyped-call]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order // inverse.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum_of_slots(grads[0], inverse), None, None


class _SummedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.slots = inverse.shape[1]
        high = accumulate_dtype(rows.dtype)
        return _sum_of_slots(rows, inverse, high).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order // ctx.slots), None, None


class _ReorderRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def _sum_of_slots(rows: Tensor, inverse: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[tokens * k, width] to [tokens, width], a token's slots added in a fixed order."""
    total = rows.index_select(0, inverse[:, 0]).to(dtype or rows.dtype)
    for column in inverse.unbind(1)[1:]:
        total += rows.index_select(0, column)
    return total


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        high = weights.dtype
        total: Tensor | None = None
        for column, weight in zip(inverse.unbind(1), weights.unbind(1), strict=True):
            term = rows.index_select(0, column).to(high)  # [tokens, width]
            if total is None:
                total = term.mul_(weight[:, None])
            else:
                total.addcmul_(term, weight[:, None])
        assert total is not None
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        slots = inverse.shape[1]
        grad = grads[0].index_select(0, order // slots).to(weights.dtype)  # [rows, width]
        dots = torch.mul(grad, rows).sum(-1)  # [rows]
        grad_weights = dots.index_select(0, inverse.view(-1)).view_as(inverse)
        grad.mul_(weights.reshape(-1).index_select(0, order)[:, None])
        return grad.to(rows.dtype), grad_weights, None, None
