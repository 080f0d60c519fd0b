"""Embedding look-up whose gradient is summed at full precision."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.main_grad import delivered, main_gradient
from kimi_pretrain.ops.precision import accumulate_dtype


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` [vocabulary, width] for ``tokens`` [...]: [..., width].

    A frequent token adds thousands of rows into one; in bf16 such a sum stops growing, so
    the gradient is summed in fp32 (fp64 for fp64) and rounded once.
    """
    return _Embedding.apply(tokens, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(tokens)
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        high = accumulate_dtype(weight.dtype)
        main = main_gradient(weight)
        total = torch.zeros_like(weight, dtype=high) if main is None else main
        rows = grads[0].reshape(-1, weight.shape[1]).to(high)
        total.index_add_(0, tokens.reshape(-1), rows)
        if main is None:
            return None, total.to(weight.dtype)
        delivered(weight)
        return None, None
