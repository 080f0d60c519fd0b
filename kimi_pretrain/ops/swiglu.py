"""SwiGLU (arXiv 2002.05202): the gated activation of every MLP in the family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from kimi_pretrain.ops.fp8_tiles import dequantise_tiles


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold gate and up side by side.

    Args:
        gate_up: [..., 2 * width], gate first.

    Returns:
        [..., width]. Backward keeps only ``gate_up``.
    """
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


def swiglu_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``swiglu`` of rows that were stored as FP8 tiles (``ops.fp8_tiles``).

    Args:
        q: [..., 2 * width] float8_e4m3fn, gate first.
        scale: [..., ceil(2 * width / 128)] fp32.
        dtype: of the result, bf16 or fp32.

    Returns:
        [..., width], computed in fp32. Without a derivative: ``swiglu_tiles_backward`` is it.
    """
    return swiglu(dequantise_tiles(q, scale, torch.float32)).to(dtype)


def swiglu_tiles_backward(grad: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Gradient of ``swiglu`` at rows that were stored as FP8 tiles.

    Args:
        grad: [..., width] of the result.
        q: [..., 2 * width] float8_e4m3fn.
        scale: [..., ceil(2 * width / 128)] fp32.

    Returns:
        [..., 2 * width] in grad's dtype, computed in fp32.
    """
    gate_up = dequantise_tiles(q, scale, torch.float32)
    return _gradient(grad.to(torch.float32), gate_up).to(grad.dtype)


def swiglu_by_tiles(
    gate_up: Tensor,
    q: Tensor,
    scale: Tensor,
    forward: Callable[[Tensor], Tensor] = swiglu,
    backward: Callable[[Tensor, Tensor, Tensor], Tensor] = swiglu_tiles_backward,
) -> Tensor:
    """``swiglu`` of rows of which backward gets FP8 tiles only.

    Args:
        gate_up: [..., 2 * width], gate first; not kept.
        q: [..., 2 * width] float8_e4m3fn, from ``quantise_tiles(gate_up)``.
        scale: [..., ceil(2 * width / 128)] fp32.
        forward: ``swiglu``, or a kernel that stands for it.
        backward: ``swiglu_tiles_backward``, or a kernel that stands for it.

    Returns:
        [..., width], of the rows themselves; its gradient is that at the rows as stored.
    """
    return _ByTiles.apply(gate_up, q, scale, forward, backward)  # type: ignore[no-any-return, no-untyped-call]


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        q: Tensor,
        scale: Tensor,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(q, scale)
        ctx.gradient = backward
        return forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, scale = ctx.saved_tensors
        return ctx.gradient(grads[0], q, scale), None, None, None, None


class _SwiGLU(torch.autograd.Function):
    # The gate is copied out first: torch's CPU kernels are slower on half rows.

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(_copy(gate), inplace=True).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _gradient(grads[0], gate_up)


def _gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = _copy(gate)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(silu(gate), grad, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(torch.mul(grad, up), gate))
    return grad_gate_up


def _copy(half: Tensor) -> Tensor:
    return half.clone(memory_format=torch.contiguous_format)
