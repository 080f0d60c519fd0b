"""SwiGLU (arXiv 2002.05202): the gated activation of every MLP in the family."""

from typing import Any

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold gate and up side by side.

    Args:
        gate_up: [..., 2 * width], gate first.

    Returns:
        [..., width]. Backward keeps only ``gate_up``.
    """
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grads[0], torch.nn.functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grads[0], up), gate, grad_input=grad_gate)
        return result
