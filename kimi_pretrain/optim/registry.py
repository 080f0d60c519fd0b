"""Optimizers by the name that a configuration gives them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, OptimizerConfig
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.muon import MuonClip

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
    if cfg.name not in _GROUPS:
        known = ", ".join(_GROUPS)
        raise ConfigError("optimizer.name", cfg.name, f"an optimizer is one of {known}", "muonclip")
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


def _iteration_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """bf16 unless the run is in fp64, or in fp32 on a machine that only emulates bf16."""
    return resolve("auto") if compute_dtype == torch.float32 else compute_dtype
