"""Root-mean-square normalisation (arXiv 1910.07467) with an analytic backward."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.main_grad import deliver
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.ops.saved import named


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension.

    Args:
        x: [..., width], any floating dtype.
        weight: [width], of x's dtype.
        eps: added to the mean square.

    Returns:
        [..., width] in x's dtype. Statistics and products are fp32 (fp64 for fp64) and
        rounded once. Backward keeps x and one number a row, not the normalised rows.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        high = accumulate_dtype(x.dtype)
        rows = x.to(high)  # [..., width]
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # [..., 1]
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        named("norm_in", scale)
        ctx.weight = weight
        ctx.save_for_backward(x, scale)
        return torch.mul(rows, scale).mul_(weight.to(high)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # With n = x * scale and y = w * n:  dw = sum(dy * n),
        # dx = scale * (dy * w - n * mean(dy * w * n)).
        (x, scale), weight = ctx.saved_tensors, ctx.weight
        high = scale.dtype
        width = x.shape[-1]
        grad = grads[0].to(high)
        normal = torch.mul(x.to(high), scale)  # [..., width]
        product = torch.mul(grad, normal)
        weight_high = weight.to(high)
        dot = torch.mv(product.view(-1, width), weight_high).view(scale.shape)  # [..., 1]
        grad_weight = product.view(-1, width).sum(0)
        normal.mul_(dot.div_(-width))
        normal.addcmul_(grad, weight_high).mul_(scale)
        return normal.to(x.dtype), deliver(weight, grad_weight), None
