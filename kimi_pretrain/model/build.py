"""From a configuration to a model, or to the part of it that a rank holds."""

from collections.abc import Mapping
from typing import TypeVar

import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.hand_out import hand_out
from kimi_pretrain.model.init import initialise
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.parallel.dispatch import Dispatcher, LocalDispatcher

C = TypeVar("C", bound=Chunk)


def from_config(
    model_cfg: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    dispatcher: Dispatcher | None = None,
    kernels: Kernels = REFERENCE,
) -> CausalLM:
    """A model with initial weights, which depend on ``seed`` and names only.

    Args:
        model_cfg: a configuration that ``config.validate`` accepts.
        dtype: of parameters and computation; router, reductions and loss are fp32 (fp64 in
            an fp64 model).
        device: ``meta`` builds shapes without memory: K2 in a second.
        seed: of the initial weights.
        dispatcher: brings tokens to experts on other ranks; by default all are here.
        kernels: who runs its operations, from ``ops.registry.kernels_for``; plain torch.
    """
    with torch.device("meta"):
        model = CausalLM(model_cfg, dtype, dispatcher or LocalDispatcher(kernels=kernels))
    return _placed(model, model_cfg, torch.device(device), seed, kernels)


def rank_model(
    model_cfg: ModelConfig,
    stages: Mapping[int, range],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    dispatcher: Dispatcher,
    kernels: Kernels = REFERENCE,
) -> RankModel:
    """The chunks of one rank; weights are those ``from_config`` would have given them.

    Args:
        model_cfg: the whole model.
        stages: the layers of each virtual stage that this rank holds.
        dtype: as for ``from_config``, as are device and seed.
        device: of parameters.
        seed: of the initial weights.
        dispatcher: decides which experts this rank holds.
        kernels: as for ``from_config``.
    """
    experts = dispatcher.experts(model_cfg.n_routed_experts)
    chunks = {}
    for stage, layers in stages.items():
        with torch.device("meta"):
            chunk = Chunk(model_cfg, layers, dtype, experts)
        chunks[stage] = _placed(chunk, model_cfg, torch.device(device), seed, kernels)
    return RankModel(model_cfg, chunks)


def _placed(
    chunk: C, model_cfg: ModelConfig, device: torch.device, seed: int, kernels: Kernels
) -> C:
    if device.type != "meta":
        chunk.to_empty(device=device)
        initialise(chunk, model_cfg, seed, chunk.experts.start)
    hand_out(chunk, kernels)
    return chunk
