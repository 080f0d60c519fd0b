"""What torch must know of each op beside its kernels: shapes without data, and derivatives."""

import torch
from torch import Tensor
from torch.library import register_fake

from kimi_pretrain.ops.fp8_tiles import TILE


def register() -> None:
    """Tell torch about the ops of the library, which has been loaded."""
    register_fake("kimi_pretrain::quantise_tiles", _quantise_tiles)
    register_fake("kimi_pretrain::dequantise_tiles", _dequantise_tiles)


def _quantise_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = -(-x.shape[-1] // TILE)
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return q, x.new_empty((*x.shape[:-1], tiles), dtype=torch.float32)


def _dequantise_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)
