"""RoPE and YaRN against published numbers (tests/fixtures/yarn.json, float64)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, RopeScalingConfig
from kimi_pretrain.ops.rope import apply_rope, inverse_frequencies, rope_tables, softmax_scale

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "yarn.json").read_text()
)


def model(
    theta: float = 50000.0, rope: int = 64, scaling: dict[str, Any] | None = None
) -> ModelConfig:
    return ModelConfig(
        qk_nope_head_dim=128,
        qk_rope_head_dim=rope,
        rope_theta=theta,
        rope_scaling=None if scaling is None else RopeScalingConfig(**scaling),
    )


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param  # type: ignore[no-any-return]


def of(case: dict[str, Any]) -> ModelConfig:
    return model(case["rope_theta"], scaling=case["rope_scaling"])


def test_frequencies_match_the_published_settings(case: dict[str, Any]) -> None:
    """Catches a wrong correction range, rounding, ramp direction or frequency base."""
    expected = torch.tensor(case["inverse_frequencies"], dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(of(case)), expected, rtol=1e-12, atol=0.0)


def test_softmax_scale_matches_the_published_settings(case: dict[str, Any]) -> None:
    """Catches mscale left out, not squared, or applied to pretraining at 4k."""
    assert softmax_scale(of(case)) == pytest.approx(case["softmax_scale"], rel=1e-12)


def test_table_scale_matches_the_published_settings(case: dict[str, Any]) -> None:
    """Catches cos/sin scaled by mscale where mscale_all_dim cancels it."""
    cos, _ = rope_tables(of(case), 1, torch.float64)
    assert cos[0, 0].item() == pytest.approx(case["table_scale"], rel=1e-12)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "tables", "softmax"),
    [
        # 0.1 ln 32 = 0.34657359; tables: (1 + 0.5 x) / (1 + x), softmax: 192^-0.5 (1 + all_dim x)^2
        (0.5, 1.0, 1.17328680 / 1.34657359, 0.0721687836 * 1.34657359**2),
        (1.0, 0.5, 1.34657359 / 1.17328680, 0.0721687836 * 1.17328680**2),
        (1.0, 0.0, 1.34657359, 0.0721687836),
    ],
)
def test_both_temperatures_when_they_differ(
    mscale: float, mscale_all_dim: float, tables: float, softmax: float
) -> None:
    """Catches mscale and mscale_all_dim exchanged: every published K2 setting has them equal."""
    cfg = model(
        scaling={"factor": 32.0, "mscale": mscale, "mscale_all_dim": mscale_all_dim},
    )
    cos, sin = rope_tables(cfg, 2, torch.float64)
    assert cos[0, 0].item() == pytest.approx(tables, rel=1e-7)
    assert torch.hypot(cos, sin).allclose(torch.tensor(tables, dtype=torch.float64), rtol=1e-7)
    assert softmax_scale(cfg) == pytest.approx(softmax, rel=1e-7)


def test_an_empty_ramp_does_not_divide_by_zero() -> None:
    """Catches NaN frequencies where both ends of the ramp clamp to the same index."""
    cfg = model(1e4, rope=8, scaling={"factor": 4.0, "original_max_position_embeddings": 4})
    frequencies = inverse_frequencies(cfg)
    plain = inverse_frequencies(model(1e4, rope=8))
    assert torch.equal(frequencies[1:], plain[1:] / 4.0)
    assert torch.equal(frequencies[:1], plain[:1])


def test_far_positions_keep_float64_angles() -> None:
    """Catches angles computed in float32: at 131,071 they are off by 1e-3."""
    cfg = model()
    cos, sin = rope_tables(cfg, torch.tensor([131_071]))
    for pair, frequency in enumerate(inverse_frequencies(cfg).tolist()):
        assert cos[0, pair].item() == pytest.approx(math.cos(131_071 * frequency), abs=1e-7)
        assert sin[0, pair].item() == pytest.approx(math.sin(131_071 * frequency), abs=1e-7)


def rotated_one_by_one(x: Tensor, cfg: ModelConfig) -> Tensor:
    """The definition, in Python floats: x [B, S, heads, d]."""
    out = torch.empty_like(x, dtype=torch.float64)
    frequencies = inverse_frequencies(cfg).tolist()
    for b, s, h in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        for j, frequency in enumerate(frequencies):
            a, c = x[b, s, h, 2 * j].item(), x[b, s, h, 2 * j + 1].item()
            cos, sin = math.cos(s * frequency), math.sin(s * frequency)
            out[b, s, h, 2 * j] = a * cos - c * sin
            out[b, s, h, 2 * j + 1] = c * cos + a * sin
    return out


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_adjacent_pairs_turn_by_position(heads: int, dtype: torch.dtype, tolerance: float) -> None:
    """Catches Llama's half-split order, a flipped sign, and positions taken along the heads."""
    cfg = model(rope=8)
    torch.manual_seed(0)
    wide = torch.randn(2, 5, heads, 7 + 8).to(dtype)
    x = wide[..., 7:]  # a slice at an odd offset, as after an odd nope width
    before = wide.clone()
    tables = rope_tables(cfg, 5, torch.promote_types(dtype, torch.float32))
    y = apply_rope(x, *tables)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(wide, before)
    torch.testing.assert_close(
        y.double(), rotated_one_by_one(x, cfg), rtol=tolerance, atol=tolerance
    )


def test_logits_depend_on_the_distance_only() -> None:
    """Catches q and k turned in opposite directions or by different tables."""
    cfg = model(rope=16)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    cos, sin = rope_tables(cfg, 64, torch.float64)

    def logit(i: int, j: int) -> float:
        qi = apply_rope(q, cos[i : i + 1], sin[i : i + 1])
        kj = apply_rope(k, cos[j : j + 1], sin[j : j + 1])
        return (qi * kj).sum().item()

    assert logit(9, 4) == pytest.approx(logit(63, 58), rel=1e-12)
    assert logit(9, 4) != pytest.approx(logit(4, 9), rel=1e-3)


def test_gradient_and_its_gradient() -> None:
    """Catches a backward that turns forwards instead of back."""
    cfg = model(rope=6)
    tables = rope_tables(cfg, 4, torch.float64)
    x = torch.randn(2, 4, 2, 6, dtype=torch.float64, requires_grad=True)

    def turn(x: Tensor) -> Tensor:
        return apply_rope(x, *tables)

    assert torch.autograd.gradcheck(turn, x)
    assert torch.autograd.gradgradcheck(turn, x)


def test_bf16_is_rounded_once() -> None:
    """Catches products and sums taken in bf16."""
    cfg = model()
    torch.manual_seed(0)
    x = torch.randn(2, 33, 2, 64).bfloat16().requires_grad_()
    tables = rope_tables(cfg, 33)
    y = apply_rope(x, *tables)
    wide = x.detach().float().requires_grad_()
    expected = apply_rope(wide, *tables)
    assert torch.equal(y, expected.bfloat16())
    upstream = torch.randn(2, 33, 2, 64).bfloat16()
    y.backward(upstream)
    expected.backward(upstream.float())
    assert x.grad is not None
    assert wide.grad is not None
    assert torch.equal(x.grad, wide.grad.bfloat16())


def test_positions_may_differ_between_sequences() -> None:
    """Catches tables [B, S, pairs] broadcast along the wrong dimension."""
    cfg = model(rope=8)
    x = torch.randn(2, 3, 2, 8)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([7, 0, 1])
    cos, sin = rope_tables(cfg, torch.stack((first, second)).flatten())
    y = apply_rope(x, cos.view(2, 3, 4), sin.view(2, 3, 4))
    for row, positions in enumerate((first, second)):
        assert torch.equal(y[row], apply_rope(x[row], *rope_tables(cfg, positions)))


def test_meta_device_and_count_of_positions() -> None:
    """Catches tables that allocate on the CPU for a model built on meta."""
    cos, sin = rope_tables(model(), 5, device="meta")
    assert cos.is_meta
    assert sin.shape == (5, 32)
    assert apply_rope(torch.empty(1, 5, 2, 64, device="meta"), cos, sin).is_meta
    by_count = rope_tables(model(), 5)
    by_position = rope_tables(model(), torch.arange(5))
    assert all(map(torch.equal, by_count, by_position))


def test_unusable_settings_are_refused() -> None:
    """Catches a scaling read as YaRN that is another one, and an odd width read as even."""
    with pytest.raises(ConfigError, match=r"qk_rope_head_dim: got 7; .*; try 8"):
        inverse_frequencies(model(rope=7))
    with pytest.raises(ConfigError, match=r"rope_scaling.type: got 'linear'"):
        softmax_scale(model(scaling={"type": "linear", "factor": 2.0}))
