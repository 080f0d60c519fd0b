"""MuonClip (arXiv 2507.20534): Muon, AdamW and QK-Clip, and the learning rate's schedule.

The public names are resolved on first use: ``optim.lr`` is arithmetic that a planner reads
without paying for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_pretrain.optim.muon import MuonClip
    from kimi_pretrain.optim.orthogonalize import newton_schulz
    from kimi_pretrain.optim.qk_clip import qk_clip_factors

__all__ = ["MuonClip", "newton_schulz", "qk_clip_factors"]

_HOME = {
    "MuonClip": "kimi_pretrain.optim.muon",
    "newton_schulz": "kimi_pretrain.optim.orthogonalize",
    "qk_clip_factors": "kimi_pretrain.optim.qk_clip",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kimi_pretrain.optim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
