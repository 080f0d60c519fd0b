"""QK-Clip: the factors, and their effect on a small latent attention computed in full."""

import math

import pytest
import torch
from torch import Tensor, nn

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.optim import MuonClip, qk_clip_factors
from kimi_pretrain.optim.qk_clip import attention_layers

HEADS, NOPE, ROPE, V, RANK, HIDDEN = 4, 6, 4, 5, 8, 16
DIMS = (NOPE, ROPE, V)
TAU = 10.0


def maxima(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def per_head(factors: Tensor, *parts: int) -> list[tuple[Tensor, ...]]:
    rows = factors.view(-1, sum(parts))
    return [tuple(head.split(parts)) for head in rows]


def test_a_clipped_head_gets_the_reports_factors_on_the_right_rows() -> None:
    """Catches rope rows scaled by the root, v rows scaled at all, nope and rope exchanged."""
    q, kv = qk_clip_factors(maxima(5.0, 40.0), TAU, *DIMS)
    assert q.shape == (2 * (NOPE + ROPE),)
    assert kv.shape == (2 * (NOPE + V),)
    gamma = TAU / 40.0
    (q0_nope, q0_rope), (q1_nope, q1_rope) = per_head(q, NOPE, ROPE)
    (k0_nope, v0), (k1_nope, v1) = per_head(kv, NOPE, V)
    for untouched in (q0_nope, q0_rope, k0_nope, v0, v1):
        assert torch.equal(untouched, torch.ones_like(untouched))
    for scaled, factor in ((q1_nope, gamma**0.5), (q1_rope, gamma), (k1_nope, gamma**0.5)):
        assert torch.allclose(scaled, torch.full_like(scaled, factor), rtol=1e-12)


@pytest.mark.parametrize(
    "beside", [-math.inf, -400.0, -1e-300, 0.0, TAU, math.inf, math.nan, 9.999]
)
def test_any_maximum_beside_a_clipped_head_stays_exactly_one(beside: float) -> None:
    """Catches the root of a negative gamma (NaN for the whole weight) and 0 * inf."""
    q, kv = qk_clip_factors(maxima(40.0, beside), TAU, *DIMS)
    assert torch.isfinite(q).all()
    assert torch.isfinite(kv).all()
    assert torch.equal(q[NOPE + ROPE :], torch.ones(NOPE + ROPE, dtype=torch.float64))
    assert torch.equal(kv[NOPE + V :], torch.ones(NOPE + V, dtype=torch.float64))
    assert float(q[0]) < 1.0


class TinyMLA(nn.Module):
    """Multi-head latent attention's logits, in the names and row order of DeepSeek-V3."""

    def __init__(self, q_lora: bool, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def random(rows: int, cols: int) -> nn.Linear:
            layer = nn.Linear(cols, rows, bias=False, dtype=dtype)
            weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
            layer.weight.data.copy_(weight)
            return layer

        attention = nn.Module()
        if q_lora:
            attention.q_a_proj = random(RANK, HIDDEN)
            attention.q_b_proj = random(HEADS * (NOPE + ROPE), RANK)
        else:
            attention.q_proj = random(HEADS * (NOPE + ROPE), HIDDEN)
        attention.kv_a_proj_with_mqa = random(RANK + ROPE, HIDDEN)
        attention.kv_b_proj = random(HEADS * (NOPE + V), RANK)
        layer = nn.Module()
        layer.self_attn = attention
        self.layers = nn.ModuleList([layer])
        self.attention = attention
        self.q_lora = q_lora
        # Two heads start well below tau, two well above.
        side = attention.q_b_proj if q_lora else attention.q_proj
        gain = torch.tensor([0.01, 3.0, 0.005, 1.0], dtype=dtype)
        side.weight.data.view(HEADS, -1).mul_(gain[:, None])

    def logits(self, x: Tensor) -> Tensor:
        """[heads, length, length] scaled, causal pairs only (others -inf); fp32 or fp64."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q_nope, q_rope = self.project(x, "q", wide).split([NOPE, ROPE], dim=-1)
        latent, k_rope = linear(x, self.attention.kv_a_proj_with_mqa, wide).split([RANK, ROPE], -1)
        k_nope = self.project(latent, "kv", wide)[..., :NOPE]
        scores = torch.einsum("qhd,khd->hqk", q_nope, k_nope)
        scores = scores + torch.einsum("qhd,kd->hqk", rotary(q_rope), rotary(k_rope[:, None])[:, 0])
        scores = scores * (NOPE + ROPE) ** -0.5
        return scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)

    def project(self, x: Tensor, side: str, wide: torch.dtype) -> Tensor:
        """[length, heads, rows of a head]."""
        a = self.attention
        if side == "kv":
            rows = linear(x, a.kv_b_proj, wide)
        elif self.q_lora:
            rows = linear(linear(x, a.q_a_proj, wide), a.q_b_proj, wide)
        else:
            rows = linear(x, a.q_proj, wide)
        return rows.view(len(x), HEADS, -1)


def linear(x: Tensor, layer: nn.Linear, wide: torch.dtype) -> Tensor:
    return x.to(wide) @ layer.weight.to(wide).T


def rotary(x: Tensor) -> Tensor:
    """Adjacent pairs of [length, heads, ROPE] turned by an angle that grows with position."""
    position = torch.arange(len(x), dtype=x.dtype)[:, None, None]
    angle = position * 0.5 ** torch.arange(ROPE // 2, dtype=x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


@pytest.mark.parametrize("q_lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_after_the_clip_no_logit_of_the_same_inputs_exceeds_tau(
    dtype: torch.dtype, q_lora: bool
) -> None:
    """Catches one-sided scaling (gamma^1.5 or gamma^0.5 left) and variants without q_lora."""
    model = TinyMLA(q_lora, dtype)
    x = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(6)).to(dtype)
    optimizer = MuonClip(model.named_parameters(), lr=0.0, qk_clip_threshold=TAU, qk_head_dims=DIMS)
    for _, p in model.named_parameters():
        p.grad = torch.ones_like(p)
    before = model.logits(x).amax(dim=(1, 2)).detach()
    assert (before > TAU).tolist() == [False, True, False, True]
    optimizer.observe_max_logits(before[None])
    optimizer.step()
    after = model.logits(x).amax(dim=(1, 2)).detach()
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
    assert float(after.max()) <= TAU * (1 + slack)
    for head in (1, 3):
        assert float(after[head]) == pytest.approx(TAU, rel=slack)
    for head in (0, 2):
        assert torch.equal(after[head], before[head])
    metrics = optimizer.qk_clip_metrics
    assert metrics["max_logit"] == pytest.approx(float(before.max()))
    assert metrics["number_clipped"] == 2
    assert metrics["share_clipped"] == 0.5
    assert metrics["last_step"] == 1


def attention_parameters(
    dtype: torch.dtype = torch.float32, layers: int = 2
) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "q_b_proj": (HEADS * (NOPE + ROPE), RANK),
        "kv_a_proj_with_mqa": (RANK + ROPE, HIDDEN),
        "kv_b_proj": (HEADS * (NOPE + V), RANK),
    }
    return [
        (
            f"model.layers.{i}.self_attn.{name}.weight",
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)),
        )
        for i in range(layers)
        for name, shape in shapes.items()
    ]


def step(optimizer: MuonClip) -> None:
    for p in optimizer.names:
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()


def test_only_the_clipped_layers_rows_change_and_only_after_the_update() -> None:
    """Catches a clip of the wrong layer, and one applied to weights before their update."""
    clipped, plain = attention_parameters(), attention_parameters()
    optimizer = MuonClip(clipped, lr=0.1, qk_clip_threshold=TAU, qk_head_dims=DIMS)
    seen = torch.full((2, HEADS), -torch.inf)
    seen[1, 2] = 4 * TAU
    seen[1, 0] = -3.0
    optimizer.observe_max_logits(seen)
    step(optimizer)
    step(reference := MuonClip(plain, lr=0.1))
    assert reference.qk_clip_metrics["max_logit"] is None
    q, kv = qk_clip_factors(seen[1], TAU, *DIMS)
    for (name, got), (_, expected) in zip(clipped, plain, strict=True):
        want = expected.detach()
        if name.endswith("1.self_attn.q_b_proj.weight"):
            want = want * q[:, None]
        elif name.endswith("1.self_attn.kv_b_proj.weight"):
            want = want * kv[:, None]
        assert torch.equal(got.detach(), want), name


def test_bf16_weights_are_clipped_in_their_masters() -> None:
    """Catches a clip that the next rounding from the master undoes."""
    named = attention_parameters(torch.bfloat16, layers=1)
    optimizer = MuonClip(named, lr=0.0, qk_clip_threshold=TAU, qk_head_dims=DIMS)
    start = {name: p.detach().float() for name, p in named}
    optimizer.observe_max_logits(torch.tensor([[1.7 * TAU, 1.0, 1.0, 1.0]]))
    step(optimizer)
    step(optimizer)
    q, _ = qk_clip_factors(torch.tensor([1.7 * TAU, 1.0, 1.0, 1.0]), TAU, *DIMS)
    name = "model.layers.0.self_attn.q_b_proj.weight"
    master = next(t for n, kind, t in optimizer.named_state() if (n, kind) == (name, "master"))
    assert torch.equal(master, start[name] * q[:, None])
    assert torch.equal(dict(named)[name].detach(), master.bfloat16())


def test_an_observation_is_used_once_and_the_last_clipped_step_is_remembered() -> None:
    """Catches weights shrunk at every later step by one old maximum."""
    named = attention_parameters(layers=1)
    optimizer = MuonClip(named, lr=0.0, qk_clip_threshold=TAU, qk_head_dims=DIMS)
    quiet = torch.full((1, HEADS), 0.5 * TAU)
    loud = quiet.clone()
    loud[0, 1] = 2 * TAU
    for maxima_of_step in (quiet, loud, quiet):
        optimizer.observe_max_logits(maxima_of_step)
        step(optimizer)
    kept = [p.detach().clone() for _, p in named]
    step(optimizer)
    assert all(torch.equal(p.detach(), k) for (_, p), k in zip(named, kept, strict=True))
    assert optimizer.last_clipped_step == 2
    assert optimizer.qk_clip_metrics["share_clipped"] == 0.0
    resumed = MuonClip(attention_parameters(layers=1))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.last_clipped_step == 2


def test_bounds_are_enough_below_tau_and_refused_above() -> None:
    """Catches a clip by the log-sum-exp, and a forward that was given another tau."""
    named = attention_parameters(layers=1)
    optimizer = MuonClip(named, lr=0.1, qk_clip_threshold=TAU, qk_head_dims=DIMS)
    bounds = torch.full((1, HEADS), 0.9 * TAU)
    optimizer.observe_max_logits(bounds, exact=torch.zeros(1, HEADS, dtype=torch.bool))
    step(optimizer)
    kept = [p.detach().clone() for _, p in named]
    optimizer.observe_max_logits(2 * bounds, exact=torch.zeros(1, HEADS, dtype=torch.bool))
    with pytest.raises(ValueError, match="exact maxima"):
        step(optimizer)
    assert all(torch.equal(p.detach(), k) for (_, p), k in zip(named, kept, strict=True))


def test_without_a_threshold_maxima_are_measured_and_nothing_is_scaled() -> None:
    named = attention_parameters(layers=1)
    optimizer = MuonClip(named, lr=0.0, weight_decay=0.0, qk_clip_threshold=None)
    kept = [p.detach().clone() for _, p in named]
    optimizer.observe_max_logits(torch.full((1, HEADS), 1e4))
    step(optimizer)
    assert all(torch.equal(p.detach(), k) for (_, p), k in zip(named, kept, strict=True))
    assert optimizer.qk_clip_metrics["max_logit"] == 1e4


def test_a_step_that_is_not_finite_destroys_no_head() -> None:
    """Catches gamma = tau / inf = 0, after which a head stays dead."""
    named = attention_parameters(layers=1)
    optimizer = MuonClip(named, lr=0.0, weight_decay=0.0, qk_clip_threshold=TAU, qk_head_dims=DIMS)
    kept = [p.detach().clone() for _, p in named]
    optimizer.observe_max_logits(torch.tensor([[math.inf, math.nan, 1.0, -math.inf]]))
    step(optimizer)
    assert all(torch.equal(p.detach(), k) for (_, p), k in zip(named, kept, strict=True))


def test_layers_are_matched_by_their_index() -> None:
    """Catches layers sorted as text (10 before 2) and a chunk that does not start at 0."""
    names = [
        f"model.layers.{i}.self_attn.{p}.weight"
        for i in (10, 2)
        for p in ("q_proj", "kv_b_proj", "o_proj", "q_a_proj")
    ]
    found = attention_layers(names)
    assert [layer.layer for layer in found] == [2, 10]
    assert found[1].q == "model.layers.10.self_attn.q_proj.weight"
    assert found[1].kv == "model.layers.10.self_attn.kv_b_proj.weight"


@pytest.mark.parametrize(
    ("shape", "dims", "match"),
    [
        ((2, HEADS), None, "qk_head_dims"),
        ((1, HEADS), DIMS, "layers"),
        ((HEADS,), DIMS, "layers"),
        ((2, HEADS + 1), DIMS, "rows of"),
        ((2, HEADS), (NOPE, ROPE, V + 1), "rows of"),
    ],
)
def test_maxima_that_do_not_fit_are_refused_at_once(
    shape: tuple[int, ...], dims: tuple[int, int, int] | None, match: str
) -> None:
    """Catches a run that fails at its first clip, after hours."""
    optimizer = MuonClip(attention_parameters(), qk_clip_threshold=TAU, qk_head_dims=dims)
    with pytest.raises(ConfigError, match=match):
        optimizer.observe_max_logits(torch.zeros(shape))
