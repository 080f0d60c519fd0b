"""What torch must know of each op beside its kernels: shapes without data, and derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from kimi_pretrain.ops.fp8_tiles import TILE
from kimi_pretrain.ops.main_grad import deliver
from kimi_pretrain.ops.saved import named


def register() -> None:
    """Tell torch about the ops of the library, which has been loaded."""
    for shape_rule in (
        quantise_tiles,
        dequantise_tiles,
        swiglu,
        swiglu_backward,
        swiglu_tiles,
        swiglu_tiles_backward,
        rms_norm,
        rms_norm_backward,
        take_rows,
        summed_rows,
        weighted_rows,
        weighted_rows_backward,
        max_logits,
    ):
        register_fake(f"kimi_pretrain::{shape_rule.__name__}", shape_rule)
    register_autograd("kimi_pretrain::swiglu", _swiglu_gradient, setup_context=_keep_gate_up)
    register_autograd("kimi_pretrain::rms_norm", _norm_gradients, setup_context=_keep_norm)
    register_autograd("kimi_pretrain::take_rows", _taken_gradient, setup_context=_keep_permutation)
    register_autograd(
        "kimi_pretrain::summed_rows", _summed_gradient, setup_context=_keep_permutation
    )
    register_autograd(
        "kimi_pretrain::weighted_rows", _weighted_gradients, setup_context=_keep_weighted
    )


# ---- shapes: what each op gives, of the right shape, dtype and device, uninitialised ----------


def quantise_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., width] -> [..., width] E4M3, [..., tiles]."""
    scale = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // TILE)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


def dequantise_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., width] E4M3, [..., tiles] -> [..., width]."""
    return q.new_empty(q.shape, dtype=dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 * width] -> [..., width]."""
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """[..., width], [..., 2 * width] -> [..., 2 * width]."""
    return gate_up.new_empty(gate_up.shape)


def swiglu_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 2 * width] E4M3, [..., tiles] -> [..., width]."""
    return q.new_empty((*q.shape[:-1], q.shape[-1] // 2), dtype=dtype)


def swiglu_tiles_backward(grad: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """[..., width], [..., 2 * width] E4M3, [..., tiles] -> [..., 2 * width]."""
    return grad.new_empty(q.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., width], [width] -> [..., width], [..., 1]."""
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """[..., width] twice, [width], [..., 1] -> [..., width], [width] fp32."""
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


def take_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """[tokens, width], [tokens * k], [tokens, k] -> [tokens * k, width]."""
    return x.new_empty((order.shape[0], x.shape[1]))


def summed_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """[tokens * k, width], [tokens * k], [tokens, k] -> [tokens, width]."""
    return rows.new_empty((inverse.shape[0], rows.shape[1]))


def weighted_rows(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """As ``summed_rows``, with weights [tokens, k]."""
    return rows.new_empty((inverse.shape[0], rows.shape[1]))


def weighted_rows_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """[tokens, width] and what the forward took -> gradients of rows and weights."""
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def max_logits(
    q: Tensor, k: Tensor, scale: float, document_ids: Tensor | None, chosen: Tensor
) -> Tensor:
    """[batch, heads, length, width] twice, [batch, length], [heads] -> [heads] fp32."""
    return q.new_empty(chosen.shape, dtype=torch.float32)


# ---- derivatives --------------------------------------------------------------------------


def _keep_gate_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    grad_gate_up: Tensor = torch.ops.kimi_pretrain.swiglu_backward(grad.contiguous(), gate_up)
    return grad_gate_up


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.weight, _ = inputs  # a weight that is saved comes back without its main gradient
    ctx.mark_non_differentiable(output[1])
    named("norm_in", output[1])
    ctx.save_for_backward(x, output[1])


def _norm_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    (x, scale), weight = ctx.saved_tensors, ctx.weight
    backward = torch.ops.kimi_pretrain.rms_norm_backward
    grad_x, grad_weight = backward(grad.contiguous(), x, weight, scale)
    return grad_x, deliver(weight, grad_weight), None


def _keep_permutation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _taken_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.kimi_pretrain.summed_rows(grad.contiguous(), *ctx.saved_tensors), None, None


def _summed_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.kimi_pretrain.take_rows(grad.contiguous(), *ctx.saved_tensors), None, None


def _keep_weighted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weighted_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    backward = torch.ops.kimi_pretrain.weighted_rows_backward
    grad_rows, grad_weights = backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_rows, grad_weights, None, None
