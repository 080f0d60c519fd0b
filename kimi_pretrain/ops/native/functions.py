"""The library's ops as functions that take what their plain-torch definitions take.

The kernels read dense rows; a view that is not dense is copied here, once (RMSNorm's within its
op, so that backward keeps the view).
"""

import torch
from torch import Tensor


def quantise_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kimi_pretrain.ops.fp8_tiles.quantise_tiles``; the same bytes."""
    q, scale = torch.ops.kimi_pretrain.quantise_tiles(x.contiguous())
    return q, scale


def dequantise_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``kimi_pretrain.ops.fp8_tiles.dequantise_tiles``; the same bytes."""
    x: Tensor = torch.ops.kimi_pretrain.dequantise_tiles(q.contiguous(), scale.contiguous(), dtype)
    return x


def swiglu(gate_up: Tensor) -> Tensor:
    """See ``kimi_pretrain.ops.swiglu.swiglu``; rounded once, where torch's rounds each product."""
    y: Tensor = torch.ops.kimi_pretrain.swiglu(gate_up.contiguous())
    return y


def swiglu_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``kimi_pretrain.ops.swiglu.swiglu_tiles``, without the wide copy in between."""
    y: Tensor = torch.ops.kimi_pretrain.swiglu_tiles(q.contiguous(), scale.contiguous(), dtype)
    return y


def swiglu_tiles_backward(grad: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """See ``kimi_pretrain.ops.swiglu.swiglu_tiles_backward``."""
    tiles = (q.contiguous(), scale.contiguous())
    grad_gate_up: Tensor = torch.ops.kimi_pretrain.swiglu_tiles_backward(grad.contiguous(), *tiles)
    return grad_gate_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kimi_pretrain.ops.norm.rms_norm``."""
    y: Tensor = torch.ops.kimi_pretrain.rms_norm(x, weight, eps)[0]
    return y


def take_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """See ``kimi_pretrain.ops.permute.take_rows``; its gradient is summed in fp32."""
    rows: Tensor = torch.ops.kimi_pretrain.take_rows(x.contiguous(), *_dense(order, inverse))
    return rows


def summed_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """See ``kimi_pretrain.ops.permute.summed_rows``."""
    y: Tensor = torch.ops.kimi_pretrain.summed_rows(rows.contiguous(), *_dense(order, inverse))
    return y


def weighted_rows(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """See ``kimi_pretrain.ops.permute.weighted_rows``; weights are fp32."""
    dense = _dense(weights, order, inverse)
    y: Tensor = torch.ops.kimi_pretrain.weighted_rows(rows.contiguous(), *dense)
    return y


@torch.no_grad()
def max_logits(
    q: Tensor, k: Tensor, scale: float, document_ids: Tensor | None, chosen: Tensor
) -> Tensor:
    """See ``kimi_pretrain.ops.attention.max_logits``; on a GPU without waiting for it."""
    ids = None if document_ids is None else document_ids.to(torch.int64).contiguous()
    op = torch.ops.kimi_pretrain.max_logits
    maxima: Tensor = op(q.contiguous(), k.contiguous(), scale, ids, chosen.contiguous())
    return maxima


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
