"""SwiGLU (arXiv 2002.05202): the gated activation of every MLP in the family."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold gate and up side by side.

    Args:
        gate_up: [..., 2 * width], gate first.

    Returns:
        [..., width]. Backward keeps only ``gate_up``.
    """
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


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
        gate, up = gate_up.chunk(2, dim=-1)
        gate = _copy(gate)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(silu(gate), grads[0], out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(torch.mul(grads[0], up), gate))
        return grad


def _copy(half: Tensor) -> Tensor:
    return half.clone(memory_format=torch.contiguous_format)
