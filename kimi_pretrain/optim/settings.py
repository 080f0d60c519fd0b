"""Hyperparameters of MuonClip for a training run."""

from dataclasses import dataclass

import torch

from kimi_pretrain.optim.muon_update import MuonSettings
from kimi_pretrain.optim.orthogonalize import Table
from kimi_pretrain.optim.qk_clip import HeadDims


@dataclass(frozen=True)
class Settings:
    """One set for the whole model; their meaning is in ``optim.muon.MuonClip``."""

    weight_decay: float
    momentum: float
    nesterov: bool
    update_rms: float
    betas: tuple[float, float]
    eps: float
    ns_table: Table
    ns_dtype: torch.dtype
    qk_clip_threshold: float | None
    qk_head_dims: HeadDims | None

    def muon(self, lr: float) -> MuonSettings:
        """What a Muon update at this learning rate takes."""
        return MuonSettings(
            lr=lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            update_rms=self.update_rms,
            table=self.ns_table,
            dtype=self.ns_dtype,
        )
