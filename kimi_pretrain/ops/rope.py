"""Rotary position embedding and YaRN, as the DeepSeek-V3 family uses them.

RoPE (arXiv 2104.09864) turns each adjacent pair ``(x[2j], x[2j+1])`` of a query or key by
the angle ``position * inverse_frequency[j]``. DeepSeek's order is *adjacent* pairs; the
``rotate_half`` order (``x[j]`` with ``x[j + d/2]``) of Llama gives other logits from the
same weights.

YaRN (arXiv 2309.00071, section 3) stretches the slow frequencies by ``factor``, keeps the
fast ones, and blends between them with a linear ramp over the index. Its temperature
enters in two places: cos and sin are scaled by ``mscale(mscale) / mscale(mscale_all_dim)``
and the softmax scale by ``mscale(mscale_all_dim) ** 2``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, RopeScalingConfig


def inverse_frequencies(cfg: ModelConfig) -> Tensor:
    """Angle of each pair per position, radians: [qk_rope_head_dim / 2] float64 on the CPU.

    Without ``rope_scaling`` these are ``theta ** (-2j / d)``; with it, YaRN's blend
    (arXiv 2309.00071, equation 19, with the ramp over the index as DeepSeek rounds it).

    Raises:
        ConfigError: an odd width, or a scaling that is not YaRN.
    """
    width = cfg.qk_rope_head_dim
    if width % 2:
        raise ConfigError(
            "model.qk_rope_head_dim", width, "RoPE rotates pairs, so it is even", str(width + 1)
        )
    pair = torch.arange(width // 2, dtype=torch.float64)
    plain = cfg.rope_theta ** (-2.0 * pair / width)  # [pairs]
    scaling = _yarn(cfg)
    if scaling is None:
        return plain
    low, high = _correction_range(scaling, width, cfg.rope_theta)
    stretched = ((pair - low) / (high - low)).clamp(0.0, 1.0)  # 0: kept, 1: divided by factor
    return plain * (1.0 - stretched) + plain / scaling.factor * stretched


def rope_tables(
    cfg: ModelConfig,
    positions: Tensor | int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position and pair, YaRN's scale included.

    Args:
        cfg: the model.
        positions: [positions] (any integer dtype) or a count, meaning 0 .. count - 1.
        dtype: of the result. The angles are computed in float64 whatever it is: in float32
            the angle at position 131,071 is already wrong in the third decimal.
        device: of the result; meta works.

    Returns:
        Two tensors [positions, qk_rope_head_dim / 2].
    """
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    angles = torch.outer(
        positions.to(device=device, dtype=torch.float64), inverse_frequencies(cfg).to(device)
    )  # [positions, pairs]
    scale = _table_scale(cfg)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the adjacent pairs of the last dimension of ``x``.

    Args:
        x: [..., positions, heads, d], bf16, fp32 or fp64; a slice of a wider tensor is fine.
        cos: [positions, d / 2] or [..., positions, d / 2], from ``rope_tables``.
        sin: as ``cos``.

    Returns:
        A new contiguous tensor of x's shape and dtype. The products are taken in float32
        (float64 for float64), so bf16 is rounded once. The tables get no gradient.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    turn = torch.complex(cos.to(wide), sin.to(wide)).unsqueeze(-2)  # [..., positions, 1, d / 2]
    return _Rotate.apply(x, turn)  # type: ignore[no-any-return, no-untyped-call]


def softmax_scale(cfg: ModelConfig) -> float:
    """Factor of the attention logits: ``(nope + rope) ** -0.5``, times ``mscale ** 2`` under YaRN.

    The mscale factor belongs to ``rope_scaling``; pretraining at 4,096 has none and must
    not be scaled by it.
    """
    scale = 1.0 / math.sqrt(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    scaling = _yarn(cfg)
    if scaling is None:
        return scale
    mscale = _mscale(scaling.factor, scaling.mscale_all_dim)
    return scale * mscale * mscale


class _Rotate(torch.autograd.Function):
    """Multiply pairs, read as complex numbers, by ``turn``; backward multiplies by its conjugate.

    One widening copy and one in-place product each way, where even and odd slices would
    stride; nothing of ``x`` is kept for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turned(x, turn)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _Rotate.apply(grads[0], turn.conj().resolve_conj()), None  # type: ignore[no-untyped-call]


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = x.to(
        turn.dtype.to_real(), copy=True, memory_format=torch.contiguous_format
    )  # [..., d], ours to overwrite
    torch.view_as_complex(pairs.view(*x.shape[:-1], x.shape[-1] // 2, 2)).mul_(turn)
    return pairs.to(x.dtype)


def _yarn(cfg: ModelConfig) -> RopeScalingConfig | None:
    scaling = cfg.rope_scaling
    if scaling is not None and scaling.type != "yarn":
        raise ConfigError(
            "model.rope_scaling.type", scaling.type, "the only RoPE scaling here is YaRN", "yarn"
        )
    return scaling


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature, ``0.1 * weight * ln(factor) + 1`` (arXiv 2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _table_scale(cfg: ModelConfig) -> float:
    scaling = _yarn(cfg)
    if scaling is None:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)


def _correction_range(scaling: RopeScalingConfig, width: int, theta: float) -> tuple[float, float]:
    """First and last pair index of the ramp: pairs before are kept, pairs after are stretched.

    A pair that makes ``rotations`` full turns within the original context has index
    ``d ln(context / (2 pi rotations)) / (2 ln theta)``.
    """

    def index(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return width * math.log(context / (2.0 * math.pi * rotations)) / (2.0 * math.log(theta))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), width - 1)
    # DeepSeek widens an empty ramp by 0.001 instead of dividing by zero.
    return low, (high if high != low else high + 0.001)
