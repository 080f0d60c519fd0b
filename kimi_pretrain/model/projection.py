"""A weight matrix without bias."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Projection(nn.Module):
    """``x @ weight.T``; the weight is uninitialised until ``model.init`` fills it."""

    def __init__(self, width_in: int, width_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
