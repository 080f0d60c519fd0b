"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from kimi_pretrain.model.hand_out import CallsKernels
from kimi_pretrain.ops.saved import named, remade


class RMSNorm(CallsKernels):
    """``ops.norm.rms_norm`` with its weight."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        named("norm_in", x)
        return remade("norm_out", self._normalised, x)

    def _normalised(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.kernels.rms_norm(x, self.weight, self.eps)
        return normalised
