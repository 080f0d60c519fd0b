"""Initial weights that do not depend on the layout."""

import hashlib

import torch
from torch import Tensor, nn

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.names import hf_views


@torch.no_grad()
def initialise(module: nn.Module, cfg: ModelConfig, seed: int = 0, first_expert: int = 0) -> None:
    """Fill every parameter and buffer of ``module`` in place.

    Matrices are normal with deviation ``initializer_range``, norms one, the router's bias
    zero. Each Hugging Face matrix has a generator of its own, seeded from (seed, its
    name), so that neither the number of ranks nor which of them holds a matrix changes its
    values. They are drawn in fp32 on the CPU and rounded to the parameter's dtype: a bf16
    and an fp64 model start from the same draw. ``first_expert`` is the index of the first
    routed expert that the module holds.
    """
    generator = torch.Generator()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        for hf_name, view in hf_views(name, parameter, first_expert):
            generator.manual_seed(seed_of(seed, hf_name))
            _normal_(view, cfg.initializer_range, generator)
    for buffer in module.buffers():
        buffer.zero_()


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for one named matrix; the same in every process and Python version."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal_(view: Tensor, deviation: float, generator: torch.Generator) -> None:
    draw = torch.empty(view.shape, dtype=torch.float32)
    view.copy_(draw.normal_(0.0, deviation, generator=generator))
