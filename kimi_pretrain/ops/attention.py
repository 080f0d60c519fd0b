"""Causal attention inside documents, with the log-sum-exp of every row and head."""

import torch
from torch import Tensor

from kimi_pretrain.ops.precision import accumulate_dtype

# Elements of the logits that the exact pass of `max_logits` holds at a time.
_EXACT_PASS_ELEMENTS = 2**22


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which a token sees itself and the earlier tokens of its document.

    Args:
        q: [batch, length, heads, qk width], as k.
        k: [batch, length, heads, qk width].
        v: [batch, length, heads, v width], at most the qk width.
        scale: factor of the logits.
        mask: from ``document_mask``; None when every row is one document.

    Returns:
        The output [batch, length, heads, v width] and, without gradient, the log-sum-exp
        of the scaled logits [batch, heads, length] in fp32 (fp64 for fp64). For every row
        ``max <= log-sum-exp``, so that its maximum bounds the maximum logit.
    """
    width = v.shape[-1]
    # The fused kernel wants one head width; zero columns of v come out as zero columns.
    padded = torch.nn.functional.pad(v, (0, q.shape[-1] - width))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        padded.transpose(1, 2),
        0.0,
        True,
        attn_mask=mask,
        scale=scale,
    )
    return out.transpose(1, 2)[..., :width], lse


def document_mask(document_ids: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive mask that separates documents: 0 inside, -inf across.

    Args:
        document_ids: [batch, length] integers, equal exactly inside one document.
        dtype: of the mask: that of q.

    Returns:
        [batch, 1, length, length], or None where no row holds two documents. Causality is
        not in it.
    """
    if document_ids is None or bool((document_ids == document_ids[:, :1]).all()):
        return None
    across = document_ids[:, None, :, None] != document_ids[:, None, None, :]
    mask = torch.zeros(across.shape, dtype=dtype, device=document_ids.device)
    return mask.masked_fill_(across, -torch.inf)


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, heads: list[int]) -> Tensor:
    """Exact maximum of the scaled logits over unmasked pairs, for the chosen heads.

    Args:
        q: [batch, length, heads, qk width], as k.
        k: [batch, length, heads, qk width].
        scale: factor of the logits.
        mask: as in ``attention``.
        heads: which heads.

    Returns:
        [len(heads)] in fp32 (fp64 for fp64), signed. Rows are taken in chunks, so that
        length x length logits never exist at once.
    """
    high = accumulate_dtype(q.dtype)
    length = q.shape[1]
    queries = q[:, :, heads].transpose(1, 2).to(high)  # [batch, chosen, length, width]
    keys = k[:, :, heads].permute(0, 2, 3, 1).to(high)  # [batch, chosen, width, length]
    position = torch.arange(length, device=q.device)
    maxima = torch.full((len(heads),), -torch.inf, dtype=high, device=q.device)
    step = max(1, _EXACT_PASS_ELEMENTS // (queries.shape[0] * len(heads) * length))
    for first in range(0, length, step):
        last = min(first + step, length)
        logits = queries[:, :, first:last] @ keys[..., :last]  # [batch, chosen, rows, last]
        future = position[:last] > position[first:last, None]  # [rows, last]
        logits.mul_(scale).masked_fill_(future, -torch.inf)
        if mask is not None:
            logits.add_(mask[:, :, first:last, :last])
        maxima = torch.maximum(maxima, logits.amax(dim=(0, 2, 3)))
    return maxima
