"""Weight gradients that the operations add to ``main_grad`` themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kimi_pretrain.ops.embedding import embedding
from kimi_pretrain.ops.grouped import group_layout, grouped_linear
from kimi_pretrain.ops.linear import linear
from kimi_pretrain.ops.linear_cross_entropy import linear_cross_entropy
from kimi_pretrain.ops.norm import rms_norm


def _rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _grouped(weight: Tensor) -> Tensor:
    layout = group_layout([2, 0, 4], 1.0, weight.dtype)
    return grouped_linear(_rows(layout.rows, 5, dtype=weight.dtype), weight, layout).square().sum()


# name -> (shape of the weight, a loss of it)
LOSSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": ((4, 5), lambda w: linear(_rows(7, 5, dtype=w.dtype), w).square().sum()),
    "stacked linear": (
        (2, 4, 5),
        lambda w: linear(_rows(3, 7, 5, dtype=w.dtype), w).square().sum(),
    ),
    "grouped": ((3, 2, 4, 5), _grouped),
    "norm": ((5,), lambda w: rms_norm(_rows(7, 5, dtype=w.dtype), w, 1e-6).square().sum()),
    "embedding": (
        (6, 5),
        lambda w: embedding(torch.tensor([1, 4, 1]), w).square().sum(),
    ),
    "head": (
        (11, 5),
        lambda w: linear_cross_entropy(
            _rows(7, 5, dtype=w.dtype).requires_grad_(), w, torch.arange(7)
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_operation_adds_its_gradient_and_says_so(name: str, dtype: torch.dtype) -> None:
    """Catches a gradient that replaces what earlier microbatches left, one that autograd keeps
    a second time, a bucket that never hears of it, and an empty group that wipes its sum."""
    shape, loss = LOSSES[name]
    plain = nn.Parameter(_rows(*shape, dtype=dtype))
    loss(plain).backward()
    assert plain.grad is not None
    weight = nn.Parameter(plain.detach().clone())
    high = torch.float64 if dtype == torch.float64 else torch.float32
    weight.main_grad = torch.ones(shape, dtype=high)  # type: ignore[attr-defined]
    told: list[int] = []
    weight.main_grad_ready = lambda: told.append(1)  # type: ignore[attr-defined]
    for _ in range(2):
        loss(weight).backward()
    assert weight.grad is None
    assert told == [1, 1]
    got = (weight.main_grad - 1.0) / 2  # type: ignore[attr-defined]
    tolerance = 1e-12 if dtype == torch.float64 else 2.0**-7  # the plain gradient is rounded
    torch.testing.assert_close(got, plain.grad.to(high), rtol=tolerance, atol=tolerance)


def test_microbatches_of_bf16_accumulate_in_fp32() -> None:
    """Catches accumulation in the parameter's dtype: 512 bf16 additions of a small gradient
    to a large one lose it entirely."""
    weight = nn.Parameter(torch.ones(1, 4, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(1, 4)  # type: ignore[attr-defined]
    linear(torch.full((1, 4), 256.0, dtype=torch.bfloat16), weight).backward()
    for _ in range(512):
        linear(torch.full((1, 4), 0.25, dtype=torch.bfloat16), weight).backward()
    assert torch.equal(weight.main_grad, torch.full((1, 4), 256.0 + 512 * 0.25))  # type: ignore[attr-defined]
