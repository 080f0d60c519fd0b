"""FP8 for storage: 1 x 128 tiles of E4M3 with one fp32 scale each (DeepSeek-V3, arXiv 2412.19437).

128 neighbours of a row share ``scale = max|x| / 448``, so that the largest of them becomes
E4M3's largest number. What one tile holds does not touch another: an outlier costs its own tile
bits, no more. The relative error is at most 2^-4 down to 2^-6 of a tile's 448, and
``scale * 2^-10`` below.

A tile with a NaN or an infinity is marked: its scale is NaN, and so is all that comes back. It
is never clipped to a number; ``marked_tiles`` reports which. These are the plain definitions;
``kimi_pretrain.ops.registry`` has the fused kernels, which give the same bytes.
"""

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError

TILE = 128
E4M3_MAX = 448.0
# A tile's largest |x| counts as at least this, so that neither scale nor its inverse leaves fp32.
SMALLEST = 2.0**-117


def quantise_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to E4M3, to nearest even, each tile of 128 by its own scale.

    Args:
        x: [..., width] bf16 or fp32; the last tile of a row may be shorter.

    Returns:
        [..., width] float8_e4m3fn, and the scales [..., ceil(width / 128)] fp32.

    Raises:
        ConfigError: another dtype.
    """
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            "dtype of an FP8 tile", x.dtype, "tiles are cut from bf16 or fp32", "fp32"
        )
    width = x.shape[-1]
    tiles = -(-width // TILE)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, tiles * TILE - width))
    values = padded.view(*x.shape[:-1], tiles, TILE)  # [..., tiles, 128]
    largest = values.abs().amax(dim=-1, keepdim=True)  # [..., tiles, 1], NaN if one is
    bounded = largest.clamp_min(SMALLEST)
    # Tensors on both sides: on a GPU torch turns a division by a number into a product.
    limit = torch.full_like(bounded, E4M3_MAX)
    marked = ~torch.isfinite(largest)
    scale = (bounded / limit).masked_fill(marked, torch.nan)
    scaled = (values * (limit / bounded)).clamp(-E4M3_MAX, E4M3_MAX).masked_fill(marked, torch.nan)
    q = scaled.to(torch.float8_e4m3fn).flatten(-2)[..., :width].contiguous()
    return q, scale.squeeze(-1)


def dequantise_tiles(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``q * scale`` tile by tile, rounded once.

    Args:
        q: [..., width] float8_e4m3fn.
        scale: [..., ceil(width / 128)] fp32.
        dtype: of the result, bf16 or fp32.

    Returns:
        [..., width].
    """
    factors = scale.repeat_interleave(TILE, dim=-1)[..., : q.shape[-1]]
    return (q.to(torch.float32) * factors).to(dtype)


def marked_tiles(scale: Tensor) -> Tensor:
    """Which tiles held a NaN or an infinity: bool, of scale's shape."""
    return torch.isnan(scale)
