"""The dense MLP and the mixture of experts."""

from functools import partial

import torch
from torch import Tensor, nn

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.hand_out import CallsKernels
from kimi_pretrain.model.projection import Projection
from kimi_pretrain.model.router import Router
from kimi_pretrain.ops.grouped import group_layout, pad_rows, unpad_rows
from kimi_pretrain.ops.kernels import Kernels
from kimi_pretrain.ops.linear import linear
from kimi_pretrain.ops.saved import named, remade, remade_by, tiled
from kimi_pretrain.ops.swiglu import swiglu_by_tiles
from kimi_pretrain.parallel.dispatch import Arrived


class DenseMLP(CallsKernels):
    """SwiGLU MLP of a dense layer, or the shared expert of a MoE layer."""

    def __init__(self, width: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, intermediate, width, dtype=dtype))
        self.down_proj = Projection(intermediate, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        inner = _swiglu("expert_down_in", linear(x, self.gate_up_proj), self.kernels)
        result: Tensor = self.down_proj(inner)
        return result


class Experts(CallsKernels):
    """The routed experts of this rank, as two stacks."""

    def __init__(self, experts: int, width: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, intermediate, width, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, width, intermediate, dtype=dtype))

    def forward(self, arrived: Arrived) -> Tensor:
        """[rows, hidden] to the same shape, each row by its expert.

        Where the rows brought their router weights, the down-projection takes its input
        times the weight, which is the weight times its output.
        """
        _, width, intermediate = self.down_proj.shape
        rows = arrived.rows
        layout = group_layout(arrived.sizes, 3 * width * intermediate, rows.dtype, rows.device)
        rows = pad_rows(rows, layout)
        named("expert_up_in", rows)
        tag = "expert_down_in" if arrived.weights is None else "swiglu_out"
        gate_up = self.kernels.grouped_linear(rows, self.gate_up_proj, layout)
        inner = _swiglu(tag, gate_up, self.kernels)
        del gate_up  # stored as FP8, it is not there while the rest is computed
        if arrived.weights is not None:
            weights = pad_rows(arrived.weights[:, None], layout)
            named("router", weights)
            inner = remade("expert_down_in", _weighted, inner, weights)
        return unpad_rows(self.kernels.grouped_linear(inner, self.down_proj, layout), layout)


def _swiglu(tag: str, gate_up: Tensor, kernels: Kernels) -> Tensor:
    """SwiGLU, its result a ``tag``: [..., 2 * width] to [..., width].

    Where gate and up are stored in FP8, their tiles are what backward reads and what the result
    is made from again: they are never whole again.
    """
    tiles = tiled("swiglu_in", gate_up)
    inner: Tensor
    if tiles is None:
        inner = remade(tag, kernels.swiglu, gate_up)
    else:
        inner = swiglu_by_tiles(gate_up, *tiles, kernels.swiglu, kernels.swiglu_tiles_backward)
        inner = remade_by(tag, inner, partial(kernels.swiglu_tiles, dtype=gate_up.dtype), *tiles)
    return inner


def _weighted(inner: Tensor, weights: Tensor) -> Tensor:
    return (inner * weights).to(inner.dtype)


class MoE(nn.Module):
    """``mlp`` of a MoE layer: router, this rank's routed experts, shared experts."""

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype, experts: range) -> None:
        super().__init__()
        self.gate = Router(cfg, dtype)
        self.experts = Experts(len(experts), cfg.hidden_size, cfg.moe_intermediate_size, dtype)
        self.shared_experts = DenseMLP(
            cfg.hidden_size, cfg.moe_intermediate_size * cfg.n_shared_experts, dtype
        )
