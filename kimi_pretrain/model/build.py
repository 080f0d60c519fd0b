"""From a configuration to a model."""

import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.init import initialise
from kimi_pretrain.parallel.dispatch import Dispatcher


def from_config(
    model_cfg: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    dispatcher: Dispatcher | None = None,
) -> CausalLM:
    """A model with initial weights, which depend on ``seed`` and names only.

    Args:
        model_cfg: a configuration that ``config.validate`` accepts.
        dtype: of parameters and computation; router, reductions and loss are fp32 (fp64 in
            an fp64 model).
        device: ``meta`` builds shapes without memory: K2 in a second.
        seed: of the initial weights.
        dispatcher: brings tokens to experts on other ranks; by default all are here.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = CausalLM(model_cfg, dtype, dispatcher)
    if device.type != "meta":
        model.to_empty(device=device)
        initialise(model, model_cfg, seed, model.experts.start)
    return model
