"""Pretraining of Kimi-K2-class mixture-of-experts models, from two CPU cores to thousands of GPUs.

The public names below are resolved on first use, so that ``import kimi_pretrain``
(and with it ``kimi-pretrain --help``) never pays for importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kimi_pretrain.checkpoint.hf import from_hf, to_hf
    from kimi_pretrain.model.build import from_config

__all__ = ["__version__", "from_config", "from_hf", "to_hf"]

_HOME = {
    "from_config": "kimi_pretrain.model.build",
    "from_hf": "kimi_pretrain.checkpoint.hf",
    "to_hf": "kimi_pretrain.checkpoint.hf",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kimi_pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
