"""Optimizers by the name that a configuration gives them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.optim.layout import plan_layout
from kimi_pretrain.optim.muon import MuonClip
from kimi_pretrain.optim.orthogonalize import coefficient_table
from kimi_pretrain.optim.qk_clip import HeadDims
from kimi_pretrain.optim.settings import Settings
from kimi_pretrain.optim.sharded import ShardedMuonClip
from kimi_pretrain.optim.who import uses_muon
from kimi_pretrain.parallel.world import World

# name -> what the group of all parameters sets beside the configuration
_GROUPS: dict[str, dict[str, Any]] = {
    "muonclip": {},
    "adamw": {"use_muon": False},
}


def build_optimizer(
    cfg: OptimizerConfig,
    model_cfg: ModelConfig,
    named_parameters: Iterable[tuple[str, Tensor]],
    compute_dtype: torch.dtype | None = None,
) -> MuonClip:
    """The optimizer of a run, over the parameters that require a gradient.

    ``muonclip`` is MuonClip; ``adamw`` is the same class with AdamW for every parameter.

    Args:
        cfg: its settings.
        model_cfg: the model, for the rows of its attention heads.
        named_parameters: of the model.
        compute_dtype: of the run; None is the first parameter's dtype.

    Raises:
        ConfigError: an unknown name, or a setting out of its range.
    """
    _require_known(cfg.name)
    parameters = [(name, p) for name, p in named_parameters if p.requires_grad]
    return MuonClip(
        [{"params": parameters, **_GROUPS[cfg.name]}],
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        qk_clip_threshold=cfg.qk_clip_threshold,
        qk_head_dims=(
            model_cfg.qk_nope_head_dim,
            model_cfg.qk_rope_head_dim,
            model_cfg.v_head_dim,
        ),
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        update_rms=cfg.update_rms,
        ns_coefficients=cfg.ns_coefficients,
        ns_dtype=_iteration_dtype(compute_dtype or parameters[0][1].dtype),
    )


def build_sharded(
    cfg: OptimizerConfig,
    parallel: ParallelConfig,
    model: RankModel,
    world: World,
) -> ShardedMuonClip:
    """The optimizer of a training run on one of its ranks; the model's parameters move.

    Args:
        cfg: its settings.
        parallel: how dense matrices are sharded and how large a bucket is.
        model: this rank's; every parameter is optimized.
        world: the ranks.

    Raises:
        ConfigError: an unknown name.
    """
    _require_known(cfg.name)
    muon = _GROUPS[cfg.name].get("use_muon", True)
    named = dict(model.named_parameters())
    specs = [
        Spec(name, tuple(p.shape), muon and uses_muon(name, p.ndim), ".mlp.experts." in name)
        for name, p in named.items()
    ]
    topology = world.topology
    layout = plan_layout(
        specs, topology.edp, topology.ep, parallel.dense_sharding, parallel.bucket_elements
    )
    dims = model.config
    settings = Settings(
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        update_rms=cfg.update_rms,
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        ns_table=coefficient_table(cfg.ns_coefficients),
        ns_dtype=_iteration_dtype(next(iter(named.values())).dtype),
        qk_clip_threshold=cfg.qk_clip_threshold,
        qk_head_dims=HeadDims(dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.v_head_dim),
    )
    optimizer = ShardedMuonClip(
        named,
        layout,
        {"edp": world.edp, "dp": world.dp, "everyone": world.everyone},
        settings,
        first_expert=model.experts.start,
    )
    for chunk in model.chunks.values():
        optimizer.buffers.gate(chunk)
    return optimizer


def _require_known(name: str) -> None:
    if name not in _GROUPS:
        known = ", ".join(_GROUPS)
        raise ConfigError("optimizer.name", name, f"an optimizer is one of {known}", "muonclip")


def _iteration_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """bf16 unless the run is in fp64, or in fp32 on a machine that only emulates bf16."""
    return resolve("auto") if compute_dtype == torch.float32 else compute_dtype
