"""Grouped matrix product: consecutive groups of rows, each with a weight of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """``x_e @ weight[e].T`` for every group e of rows; no row is dropped or padded.

    Args:
        x: [rows, width_in], the rows of group 0 first.
        weight: [groups, width_out, width_in].
        sizes: rows of each group, zero allowed; they sum to ``rows``.

    Returns:
        [rows, width_out]. The weight's gradient has the stacked shape, zero for empty groups.
    """
    return _GroupedLinear.apply(x, weight, sizes)  # type: ignore[no-any-return, no-untyped-call]


class _GroupedLinear(torch.autograd.Function):
    """One ``mm`` a group into slices of one result, the same for every dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return grouped_mm(x, weight.transpose(1, 2), sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        grad_x = grouped_mm(grad, weight, ctx.sizes) if ctx.needs_input_grad[0] else None
        grad_weight = (
            grouped_weight_gradient(grad, x, ctx.sizes) if ctx.needs_input_grad[1] else None
        )
        return grad_x, grad_weight, None


def grouped_mm(x: Tensor, matrices: Tensor, sizes: Sequence[int]) -> Tensor:
    """``x_e @ matrices[e]``: [rows, a] and [groups, a, b] to [rows, b]."""
    result = x.new_empty(x.shape[0], matrices.shape[2])
    for rows, matrix, out in zip(
        torch.split(x, list(sizes)),
        matrices.unbind(),
        torch.split(result, list(sizes)),
        strict=True,
    ):
        if rows.shape[0]:
            torch.mm(rows, matrix, out=out)
    return result


def grouped_weight_gradient(grad: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """``grad_e.T @ x_e``: [rows, b] and [rows, a] to [groups, b, a]."""
    result = x.new_empty(len(sizes), grad.shape[1], x.shape[1])
    for g, rows, out in zip(
        torch.split(grad, list(sizes)), torch.split(x, list(sizes)), result.unbind(), strict=True
    ):
        if rows.shape[0]:
            torch.mm(g.t(), rows, out=out)
        else:
            out.zero_()
    return result
