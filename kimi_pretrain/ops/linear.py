"""Matrix product with a weight whose gradient is accumulated where it is computed."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.main_grad import deliver_product


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``.

    Args:
        x: [..., width_in]; of a wider dtype than the weight's, the product is x's, and so
            is the weight's gradient.
        weight: [..., width_in], a stack of rows: [width_out, width_in] flattened.

    Returns:
        [..., width_out] in x's dtype.
    """
    return _Linear.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # Not through save_for_backward: a saved tensor comes back without its attributes.
        ctx.weight = weight
        ctx.save_for_backward(x)
        return torch.nn.functional.linear(x, _matrix(weight, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, _matrix(weight, x))
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])  # [rows, width_out]
            grad_weight = deliver_product(weight, rows, x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight


def _matrix(weight: Tensor, x: Tensor) -> Tensor:
    return weight.view(-1, weight.shape[-1]).to(x.dtype)
