"""Weight matrices without bias, the output head among them."""

import torch
from torch import Tensor, nn

from kimi_pretrain.ops.linear import linear
from kimi_pretrain.ops.linear_cross_entropy import linear_cross_entropy


class Projection(nn.Module):
    """``x @ weight.T``; the weight is uninitialised until ``model.init`` fills it."""

    def __init__(self, width_in: int, width_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Head(Projection):
    """``lm_head``: logits, or with labels their loss without ever holding all logits."""

    def forward(
        self, x: Tensor, labels: Tensor | None = None, denominator: int | None = None
    ) -> Tensor:
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, labels, denominator)
