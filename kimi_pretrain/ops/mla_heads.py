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
        queries and keys [batch, heads, length, nope + rope] and values
        [batch, heads, length, v], contiguous: the layout that attention multiplies.
    """
    return _MLAHeads.apply(q, kv, k_rope, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _MLAHeads(torch.autograd.Function):
    """Assembles all three in one pass each way; nothing but the tables is kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        batch, length, heads, width = q.shape
        nope = width - k_rope.shape[-1]
        queries = q.new_empty(batch, heads, length, width)
        keys = torch.empty_like(queries)
        by_token = queries.transpose(1, 2)  # [batch, length, heads, width]
        by_token[..., :nope] = q[..., :nope]
        by_token[..., nope:] = apply_rope(q[..., nope:], cos, sin)
        by_token = keys.transpose(1, 2)
        by_token[..., :nope] = kv[..., :nope]
        by_token[..., nope:] = apply_rope(k_rope.unsqueeze(-2), cos, sin)
        values = kv[..., nope:].transpose(1, 2).contiguous()
        return queries, keys, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_queries, grad_keys, grad_values = (g.transpose(1, 2) for g in grads)
        batch, length, heads, width = grad_queries.shape
        nope = width - 2 * cos.shape[-1]
        back = -sin  # the transpose of a rotation turns the other way
        grad_q = grad_queries.new_empty(batch, length, heads, width)
        grad_q[..., :nope] = grad_queries[..., :nope]
        grad_q[..., nope:] = apply_rope(grad_queries[..., nope:], cos, back)
        grad_kv = torch.cat([grad_keys[..., :nope], grad_values], dim=-1)
        shared = grad_keys[..., nope:].sum(-2, keepdim=True)  # [batch, length, 1, rope]
        grad_k_rope = apply_rope(shared, cos, back).squeeze(-2)
        return grad_q, grad_kv, grad_k_rope, None, None
