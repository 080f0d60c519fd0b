"""The sharded optimizer within one rank: MuonClip by another memory layout."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.optim.layout import plan_layout
from kimi_pretrain.optim.muon import MuonClip
from kimi_pretrain.optim.orthogonalize import coefficient_table
from kimi_pretrain.optim.qk_clip import HeadDims
from kimi_pretrain.optim.settings import Settings
from kimi_pretrain.optim.sharded import ShardedMuonClip
from kimi_pretrain.optim.who import uses_muon
from kimi_pretrain.parallel.collectives import Group

HEADS, NOPE, ROPE, V, TAU = 2, 3, 2, 4, 10.0
SHAPES = {
    "model.embed_tokens.weight": (7, 5),
    "model.layers.0.self_attn.q_proj.weight": (HEADS * (NOPE + ROPE), 5),
    "model.layers.0.self_attn.kv_b_proj.weight": (HEADS * (NOPE + V), 3),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 2, 4, 5),
    "model.layers.1.mlp.experts.down_proj": (3, 5, 4),
    "model.norm.weight": (5,),
}


def _parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def _sharded(named: dict[str, nn.Parameter], tau: float | None = TAU) -> ShardedMuonClip:
    specs = [
        Spec(n, tuple(p.shape), uses_muon(n, p.ndim), ".experts." in n) for n, p in named.items()
    ]
    dtype = next(iter(named.values())).dtype
    settings = Settings(
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        update_rms=0.2,
        betas=(0.9, 0.95),
        eps=1e-8,
        ns_table=coefficient_table("keller5"),
        ns_dtype=dtype,
        qk_clip_threshold=tau,
        qk_head_dims=HeadDims(NOPE, ROPE, V),
    )
    groups = {kind: Group(kind) for kind in ("edp", "dp", "everyone")}
    return ShardedMuonClip(named, plan_layout(specs, 1, 1), groups, settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_one_rank_is_muonclip(dtype: torch.dtype) -> None:
    """Catches a second implementation that drifts: momentum, decay, moments, clip, rounding.

    Matrices are equal bit for bit; torch's fused AdamW rounds the last elements of a tensor
    otherwise than its vectors, so its results depend on where a shard ends.
    """
    ours, theirs = _parameters(dtype), _parameters(dtype)
    sharded = _sharded(ours)
    plain = MuonClip(
        theirs.items(), qk_clip_threshold=TAU, qk_head_dims=(NOPE, ROPE, V), ns_dtype=dtype
    )
    maxima = torch.tensor([[4.0, 25.0], [1.0, 2.0]], dtype=torch.float64)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        sharded.buffers.zero()
        for name, parameter in ours.items():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.add_(grad)  # type: ignore[attr-defined]
            theirs[name].main_grad = grad.to(parameter.main_grad)  # type: ignore[attr-defined]
        for group in plain.param_groups:
            group["lr"] = 0.01
        plain.observe_max_logits(maxima)
        sharded.observe_max_logits(maxima)
        plain.step()
        sharded.step(0.01)
    assert sharded.qk_clip_metrics == plain.qk_clip_metrics
    assert sharded.qk_clip_metrics["number_clipped"] == 1
    for name, parameter in ours.items():
        if uses_muon(name, parameter.ndim) or dtype == torch.bfloat16:
            assert torch.equal(parameter, theirs[name]), name
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-14, atol=0.0)
    held = {(p.kind, p.name) for p in sharded.pieces()}
    assert ("momentum", "model.layers.1.mlp.experts.2.up_proj.weight") in held
    assert ("exp_avg_sq", "model.norm.weight") in held


def test_a_bound_above_tau_updates_nothing() -> None:
    """Catches a clip by a bound, and a step that fails half way."""
    named = _parameters(torch.float64)
    sharded = _sharded(named)
    for parameter in named.values():
        parameter.main_grad.fill_(1.0)  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in named.values()]
    sharded.observe_max_logits(
        torch.full((2, HEADS), 11.0), torch.zeros(2, HEADS, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="another tau"):
        sharded.step(0.1)
    assert sharded.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, named.values(), strict=True))


def test_norm_and_clip_are_global() -> None:
    """Catches a norm by bucket, and clipping that touches gradients below the limit."""
    named = _parameters(torch.float32)
    sharded = _sharded(named)
    count = sum(p.numel() for p in named.values())
    for parameter in named.values():
        parameter.main_grad.fill_(2.0)  # type: ignore[attr-defined]
    norm = float(sharded.norm())
    assert norm == pytest.approx(2.0 * count**0.5, rel=1e-15)
    sharded.clip_gradients(norm, None)
    sharded.clip_gradients(norm, norm)
    assert _largest(named) == 2.0
    sharded.clip_gradients(norm, 1.0)
    assert float(sharded.norm()) == pytest.approx(1.0, rel=1e-6)


def test_nonfinite_gradients_are_named() -> None:
    """Catches a verdict that says something is wrong but not in which expert."""
    named = _parameters(torch.float32)
    sharded = _sharded(named)
    named["model.layers.1.mlp.experts.down_proj"].main_grad[2, 0, 1] = float("nan")  # type: ignore[attr-defined]
    assert sharded.nonfinite() == ["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert not torch.isfinite(sharded.norm())


def test_what_forward_needs_first_is_gathered_first() -> None:
    """Catches a forward whose first layer waits for the parameters of all layers."""
    sharded = _sharded(_parameters(torch.float64))
    gathered: list[str] = []
    for shard in sharded.shards:
        name = shard.bucket.slots[-1].spec.name
        shard.buffers.gather = partial(gathered.append, name)  # type: ignore[method-assign]
    sharded.step(0.1)
    assert len(gathered) == len(sharded.shards) > 3
    assert gathered[0] == "model.embed_tokens.weight"
    assert gathered == [shard.bucket.slots[-1].spec.name for shard in reversed(sharded.shards)]


def test_a_load_reaches_the_parameters_when_it_is_published() -> None:
    """Catches bf16 parameters that stay what they were before a checkpoint was loaded."""
    named = _parameters(torch.bfloat16)
    sharded = _sharded(named)
    for piece in sharded.pieces():
        if piece.kind == "master":
            piece.values.fill_(3.0)
    sharded.publish()
    assert all(bool((p == 3.0).all()) for p in named.values())


def _largest(named: dict[str, Any]) -> float:
    return max(float(p.main_grad.max()) for p in named.values())
