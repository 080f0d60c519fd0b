"""The four phases, run apart between detached tensors as a schedule runs them."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.dispatch import LocalDispatcher

TinyConfig = Callable[..., ModelConfig]


def cut(value: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """A copy whose differentiable tensors are detached leaves; notes (tensor, leaf) pairs."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        for tensor, leaf in pairs:
            if tensor is value:
                return leaf
        leaf = value.detach().requires_grad_()
        pairs.append((value, leaf))
        return leaf
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: cut(getattr(value, f.name), pairs) for f in fields(value)})
    return value


@pytest.mark.parametrize("index", [0, 1], ids=["dense", "moe"])
def test_phases_between_detached_tensors_equal_the_plain_layer(
    tiny: TinyConfig, index: int
) -> None:
    """A phase that reaches around its boundary loses its gradient here."""
    cfg = tiny()
    model = from_config(cfg, dtype=torch.float64)
    layer = model.model.layers[str(index)]
    dispatcher = LocalDispatcher()
    torch.manual_seed(0)
    x = torch.randn(2, 9, cfg.hidden_size, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)

    def microbatch() -> Microbatch:
        record = StepRecord.for_model(cfg, tau=1.0, aux_scale=1.0, dtype=torch.float64)
        return Microbatch.build(cfg, 9, torch.float64, x.device, None, record)

    plain = layer(x, microbatch(), dispatcher)
    parameters = list(layer.parameters())
    want = torch.autograd.grad(plain, [x, *parameters], grad)

    shared = microbatch()
    start = x.detach().requires_grad_()
    boundaries: list[list[tuple[Tensor, Tensor]]] = []
    value: Any = start
    for phase in (
        lambda v: layer.attend(v, shared, dispatcher),
        lambda v: layer.dispatch(v, dispatcher),
        layer.expert,
        lambda v: layer.combine(v, dispatcher),
    ):
        boundaries.append([])
        value = cut(phase(value), boundaries[-1])
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-14)
    value.grad = grad
    for pairs in reversed(boundaries):
        done = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
        torch.autograd.backward([t for t, _ in done], [g for _, g in done])
    for parameter, w in zip([start, *parameters], want, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, w, rtol=1e-9, atol=1e-13)


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
