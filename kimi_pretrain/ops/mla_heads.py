"""From the up-projections of multi-head latent attention to queries, keys and values."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.rope import apply_rope


def mla_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the rope parts and share the one rotated key among the heads.

    Args:
        q: [batch, length, heads, nope + rope].
        kv: [batch, length, heads, nope + v]: a head's key without position, then its value.
        k_rope: [batch, length, rope], shared by the heads.
        cos: [length, rope / 2], from ``rope_tables``.
        sin: as cos.

    Returns:
        queries and keys [batch, length, heads, nope + rope] and values
        [batch, length, heads, v]; the values are a view of ``kv``.
    """
    nope = q.shape[-1] - k_rope.shape[-1]
    queries, keys = _Rotated.apply(q, kv[..., :nope], k_rope, cos, sin)  # type: ignore[no-untyped-call]
    return queries, keys, kv[..., nope:]


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_nope: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        nope = k_nope.shape[-1]
        queries = q.clone()
        queries[..., nope:] = apply_rope(q[..., nope:], cos, sin)
        keys = torch.empty_like(queries)
        keys[..., :nope] = k_nope
        keys[..., nope:] = apply_rope(k_rope.unsqueeze(-2), cos, sin)
        return queries, keys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_queries, grad_keys = grads
        nope = grad_queries.shape[-1] - 2 * cos.shape[-1]
        back = -sin  # the transpose of a rotation turns the other way
        grad_q = grad_queries.clone()
        grad_q[..., nope:] = apply_rope(grad_queries[..., nope:], cos, back)
        shared = grad_keys[..., nope:].sum(-2, keepdim=True)
        grad_k_rope = apply_rope(shared, cos, back).squeeze(-2)
        return grad_q, grad_keys[..., :nope], grad_k_rope, None, None
