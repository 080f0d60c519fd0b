"""Typed configuration: schema, composition, validation. Nothing here imports torch.

``compose`` is resolved on first use: only composing imports Hydra, reading a type does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_pretrain.config.composition import compose

__all__ = ["compose"]


def __getattr__(name: str) -> object:
    if name != "compose":
        raise AttributeError(f"module 'kimi_pretrain.config' has no attribute {name!r}")
    return import_module("kimi_pretrain.config.composition").compose
