"""A layer's forward as a plain module."""

from collections.abc import Callable

import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config

TinyConfig = Callable[..., ModelConfig]


def test_gradients_are_dense_in_memory(tiny: TinyConfig) -> None:
    """An expanded (stride 0) gradient breaks collectives and grouped products."""
    cfg = tiny()
    model = from_config(cfg)
    tokens = torch.randint(cfg.vocab_size, (2, 8))
    model.loss(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.is_contiguous(), name
        assert parameter.grad.dtype == parameter.dtype
