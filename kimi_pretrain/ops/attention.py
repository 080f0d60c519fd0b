"""Causal attention inside documents, with the log-sum-exp of every row and head.

Blocks of query rows against all keys they may see, a few heads at a time, as batched
matrix products: length x length logits never exist at once, and logits and softmax are
fp32 (fp64 for fp64) whatever the inputs are. Unlike torch's fused CPU kernel it needs no
padding of values to the width of keys, and its log-sum-exp is exact to fp32.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.ops.saved import keeps, named

# Query rows of a block: an eighth of the length, within these. Short blocks waste less on
# masked logits, long ones add to the gradients of keys and values less often.
_MIN_ROWS, _MAX_ROWS = 64, 256
# Logits of a block of rows and heads: 1 MiB in fp32, to stay in a core's own cache.
_BLOCK_ELEMENTS = 2**18
# An accelerator has no such cache, and each block costs it some ten launches: longer blocks of
# 512 MiB, all of K2's heads at 4,096 tokens.
_ACCELERATOR_ROWS, _ACCELERATOR_BLOCK_ELEMENTS = 512, 2**27
# Softmax weights up to this many are kept for backward (16 MiB in bf16); more are recomputed.
_KEPT_ELEMENTS = 2**23


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which a token sees itself and the earlier tokens of its document.

    Args:
        q: [batch, heads, length, qk width], as k.
        k: [batch, heads, length, qk width].
        v: [batch, heads, length, v width].
        scale: factor of the logits.
        document_ids: [batch, length] integers, equal exactly inside one document; None when
            every row is one document.

    Returns:
        The output [batch, length, heads, v width] and, without gradient, the log-sum-exp
        of the scaled logits [batch, heads, length] in fp32 (fp64 for fp64). For every row
        ``max <= log-sum-exp``, so that its maximum bounds the maximum logit.
    """
    out, lse = _Attention.apply(q, k, v, scale, document_ids)  # type: ignore[no-untyped-call]
    return out, lse


def several_documents(document_ids: Tensor | None) -> Tensor | None:
    """``document_ids`` [batch, length] itself, or None where no row holds two documents."""
    if document_ids is None or bool((document_ids == document_ids[:, :1]).all()):
        return None
    return document_ids


@torch.no_grad()
def max_logits(
    q: Tensor, k: Tensor, scale: float, document_ids: Tensor | None, chosen: Tensor
) -> Tensor:
    """Exact maximum of the scaled logits over unmasked pairs, for the chosen heads.

    Args:
        q: [batch, heads, length, qk width], as k.
        k: [batch, heads, length, qk width].
        scale: factor of the logits.
        document_ids: as in ``attention``.
        chosen: [heads] bool.

    Returns:
        [heads] in fp32 (fp64 for fp64), signed; -inf for a head that is not chosen.
    """
    high = accumulate_dtype(q.dtype)
    maxima = torch.full(chosen.shape, -torch.inf, dtype=high, device=q.device)
    heads = chosen.nonzero()[:, 0]
    if not len(heads):
        return maxima
    of_head = heads.repeat(q.shape[0])  # [batch x chosen]
    for pairs, _, logits in _logits(_flat(q[:, heads]), _flat(k[:, heads]), scale, document_ids):
        maxima.scatter_reduce_(0, of_head[pairs], logits.amax(dim=(1, 2)), "amax")
    return maxima


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = q.shape
        high = accumulate_dtype(q.dtype)
        values = _flat(v)
        out = torch.empty_like(values)
        lse = torch.empty(batch * heads, length, dtype=high, device=q.device)
        elements = batch * heads * length * (length + _MIN_ROWS) // 2
        worth = elements <= _KEPT_ELEMENTS and keeps("attn_weights")
        keep = any(ctx.needs_input_grad) and worth
        kept = []
        for pairs, rows, logits in _logits(_flat(q), _flat(k), scale, document_ids):
            weights = torch.softmax(logits, dim=-1)
            # The largest weight is at least 1 / length: one exponential serves both.
            largest = weights.amax(dim=-1).log_()
            torch.sub(logits.amax(dim=-1), largest, out=lse[pairs, rows])
            weights = weights.to(v.dtype)
            out[pairs, rows] = torch.bmm(weights, values[pairs, : rows.stop])
            if keep:
                kept.append(weights)
        result = out.view(batch, heads, length, -1).transpose(1, 2).contiguous()
        named("attn_out", result)
        named("attn_weights", *kept)
        ctx.save_for_backward(q, k, v, result, document_ids, *kept)
        ctx.scale = scale
        lse = lse.view(batch, heads, length)
        ctx.mark_non_differentiable(lse)
        return result, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # P = softmax(S), O = P V:  dV = P^T dO,  dP = dO V^T,
        # dS = P * (dP - rowsum(dO * O)),  dQ = dS K,  dK = dS^T Q  (arXiv 2205.14135).
        q, k, v, out, document_ids, *kept = ctx.saved_tensors
        high = accumulate_dtype(q.dtype)
        queries, keys, values = _flat(q), _flat(k), _flat(v)
        grad = _flat(grads[0].transpose(1, 2))  # [pairs, length, v width]
        delta = (grads[0].to(high) * out).sum(-1).transpose(1, 2)  # [batch, heads, length]
        delta = delta.reshape(grad.shape[:2]).unsqueeze(-1)  # [pairs, length, 1]
        grad_q = torch.empty_like(queries)
        grad_k = torch.zeros_like(keys, dtype=high)
        grad_v = torch.zeros_like(values, dtype=high)
        blocks: Iterator[tuple[slice, slice, Tensor]]
        if kept:
            geometry = _blocks(queries)
            blocks = ((p, r, w) for (p, r), w in zip(geometry, kept, strict=True))
        else:
            recomputed = _logits(queries, keys, ctx.scale, document_ids)
            blocks = ((p, r, torch.softmax(s, dim=-1).to(v.dtype)) for p, r, s in recomputed)
        for pairs, rows, weights in blocks:  # weights [pairs, rows, seen]
            seen = slice(0, rows.stop)
            grad_v[pairs, seen] += torch.bmm(weights.transpose(1, 2), grad[pairs, rows])
            grad_weights = torch.bmm(grad[pairs, rows], values[pairs, seen].transpose(1, 2))
            grad_logits = (grad_weights - delta[pairs, rows]).mul_(weights).to(q.dtype)
            grad_q[pairs, rows] = torch.bmm(grad_logits, keys[pairs, seen])
            grad_k[pairs, seen] += torch.bmm(grad_logits.transpose(1, 2), queries[pairs, rows])
        return (
            grad_q.mul_(ctx.scale).view(q.shape),
            grad_k.mul_(ctx.scale).to(k.dtype).view(k.shape),
            grad_v.to(v.dtype).view(v.shape),
            None,
            None,
        )


def _flat(x: Tensor) -> Tensor:
    """[batch, heads, length, width] to [batch x heads, length, width], contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _largest(x: Tensor) -> tuple[int, int]:
    """Rows and elements of a block where ``x`` is."""
    if x.device.type == "cpu":
        return _MAX_ROWS, _BLOCK_ELEMENTS
    return _ACCELERATOR_ROWS, _ACCELERATOR_BLOCK_ELEMENTS


def _blocks(queries: Tensor) -> Iterator[tuple[slice, slice]]:
    """(pairs, rows): (sequence, head) pairs and query rows, which see the keys below rows.stop.

    Of queries [pairs, length, width].
    """
    pairs, length, _ = queries.shape
    longest, elements = _largest(queries)
    size = min(max(_MIN_ROWS, length // 8), longest)
    step = max(1, elements // (size * length))
    for first_pair in range(0, pairs, step):
        for first in range(0, length, size):
            rows = slice(first, min(first + size, length))
            yield slice(first_pair, min(first_pair + step, pairs)), rows


def _logits(
    q: Tensor, k: Tensor, scale: float, document_ids: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every block of ``_blocks`` with its logits [pairs, rows, rows.stop].

    Scaled, -inf where masked, fp32 (fp64 for fp64), from q and k [pairs, length, width].
    The logits of one block overwrite those of the block before.
    """
    high = accumulate_dtype(q.dtype)
    longest, _ = _largest(q)
    future = torch.full((longest, longest), -torch.inf, dtype=high, device=q.device).triu_(1)
    queries, keys = q.to(high) * scale, k.to(high).transpose(1, 2)
    second = [] if document_ids is None else _second_documents(document_ids)
    memory = torch.empty(0, dtype=high, device=q.device)
    for pairs, rows in _blocks(q):
        size = rows.stop - rows.start
        shape = (pairs.stop - pairs.start, size, rows.stop)
        if memory.numel() < math.prod(shape):
            memory = memory.new_empty(shape[0] * size * q.shape[1])
        logits = memory[: math.prod(shape)].view(shape)
        torch.bmm(queries[pairs, rows], keys[pairs, :, : rows.stop], out=logits)
        logits[:, :, rows.start :].add_(future[:size, :size])
        if document_ids is not None:
            _mask_documents_(logits, pairs, rows, document_ids, q.shape[0], second)
        yield pairs, rows, logits


def _second_documents(document_ids: Tensor) -> list[int]:
    """Where each sequence's second document starts; its length if it has one document."""
    other = document_ids != document_ids[:, :1]
    start = torch.where(other.any(dim=1), other.int().argmax(dim=1), document_ids.shape[1])
    return start.tolist()


def _mask_documents_(
    logits: Tensor, pairs: slice, rows: slice, document_ids: Tensor, total: int, second: list[int]
) -> None:
    """-inf, in place, where query and key of a block are of different documents.

    One comparison serves all heads of a sequence; a block within the sequence's first
    document needs none.
    """
    heads = total // document_ids.shape[0]
    for sequence in range(pairs.start // heads, -(-pairs.stop // heads)):
        if rows.stop <= second[sequence]:
            continue
        first, last = max(pairs.start, sequence * heads), min(pairs.stop, (sequence + 1) * heads)
        ids = document_ids[sequence, : rows.stop]
        bias = logits.new_zeros(rows.stop - rows.start, rows.stop)
        bias.masked_fill_(ids[rows, None] != ids, -torch.inf)
        logits[first - pairs.start : last - pairs.start].add_(bias)
