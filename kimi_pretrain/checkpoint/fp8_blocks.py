"""The released FP8 weights of DeepSeek-V3 and Kimi K2: E4M3 with one scale a 128 x 128 block.

A weight ``W [M, N]`` is stored as ``q [M, N]`` float8_e4m3fn beside
``weight_scale_inv [ceil(M / 128), ceil(N / 128)]`` float32, with ``W = q * scale`` within
a block (DeepSeek-V3, arXiv 2412.19437, section 3.3). Despite its name the scale
multiplies. Blocks at the lower and right edge may be partial: K2's ``kv_a_proj_with_mqa``
has 576 rows and 5 rows of scales.
"""

import torch
from torch import Tensor

BLOCK = 128


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Shape of the block scales of a weight [M, N]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """``q * scale`` block by block, in float32.

    Args:
        q: [M, N] float8_e4m3fn.
        scale: [ceil(M / 128), ceil(N / 128)] float32.

    Returns:
        [M, N] float32. Nothing else of that size is allocated.
    """
    weight = q.to(torch.float32)
    for rows, scales in zip(torch.split(weight, BLOCK), scale, strict=True):  # [<=128, N]
        rows.mul_(scales.repeat_interleave(BLOCK)[: weight.shape[1]])
    return weight
