"""Rows to expert order and back: CPU loops, the CUDA source on the CPU, and torch's dispatch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.ops.registry import select

DTYPES = [torch.bfloat16, torch.float32]
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6}
TOKENS, SLOTS = 9, 3


def case(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """rows [27, width], weights [9, 3] with a negative and a zero, order, inverse, grad."""
    random = torch.Generator().manual_seed(width)
    rows = torch.randn(TOKENS * SLOTS, width, generator=random).to(dtype)
    weights = torch.randn(TOKENS, SLOTS, generator=random)
    weights[0, 0] = 0.0
    order = torch.randperm(TOKENS * SLOTS, generator=random)
    inverse = torch.argsort(order).view(TOKENS, SLOTS)
    grad = torch.randn(TOKENS, width, generator=random).to(dtype)
    return rows, weights, order, inverse, grad


def exact(rows: Tensor, weights: Tensor, inverse: Tensor, grad: Tensor) -> list[Tensor]:
    """The weighted sum and its two gradients in fp64, by autograd."""
    leaves = [rows.double().requires_grad_(), weights.double().requires_grad_()]
    y = (leaves[1][:, :, None] * leaves[0][inverse]).sum(1)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def close(got: Tensor, want: Tensor, relative: float) -> None:
    slack = 2e-6 * want.abs().amax()
    assert ((got.double() - want).abs() <= relative * want.abs() + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2048, 136, 5])
def test_weighted_rows(doors: Any, backend: str, width: int, dtype: torch.dtype) -> None:
    """Catches a token that gets another's rows, and a weight's gradient at the wrong slot."""
    rows, weights, order, inverse, grad = case(width, dtype)
    want = exact(rows, weights, inverse, grad)
    y, grad_rows = torch.empty_like(grad), torch.empty_like(rows)
    grad_weights = torch.full_like(weights, torch.nan)
    suffix, shape = SUFFIX[dtype], (TOKENS, SLOTS, width)
    doors(f"weighted_rows_{backend}_{suffix}", rows, weights, inverse, y, *shape)
    name = f"weighted_rows_backward_{backend}_{suffix}"
    doors(name, grad, rows, weights, order, grad_rows, grad_weights, *shape)
    close(y, want[0], RELATIVE[dtype])
    close(grad_rows, want[1], RELATIVE[dtype])
    close(grad_weights, want[2], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2048, 5])
def test_taken_rows_on_cuda(doors: Any, width: int, dtype: torch.dtype) -> None:
    """Catches a row of the wrong token, and columns that a block leaves out."""
    _, _, order, _, x = case(width, dtype)
    rows = torch.full((TOKENS * SLOTS, width), torch.nan, dtype=dtype)
    doors(f"take_rows_cuda_{SUFFIX[dtype]}", x, order, rows, TOKENS, SLOTS, width)
    assert torch.equal(rows, x[order // SLOTS])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ops_and_their_autograd_equal_plain_torch(dtype: torch.dtype) -> None:
    """Catches gradients that are not registered, and arguments whose order differs."""
    rows, weights, order, inverse, grad = case(40, dtype)
    results = []
    for kernels in ("reference", "native"):
        take, summed, weighted = (
            select(op, kernels, dtype=dtype) for op in ("take_rows", "summed_rows", "weighted_rows")
        )
        x, w = grad.clone().requires_grad_(), weights.clone().requires_grad_()
        taken = take(x, order, inverse)
        y = weighted(taken + rows, w, order, inverse)
        z = summed(taken * rows, order, inverse)
        gradients = torch.autograd.grad([y, z], [x, w], [grad, grad])
        results.append([taken, y, z, *gradients])
    tolerance = 2.0**-5 if dtype == torch.bfloat16 else 1e-5  # plain torch sums some in bf16
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.usefixtures("native")
def test_an_index_outside_is_refused() -> None:
    """Catches a read of memory that is nobody's."""
    rows, weights, order, inverse, _ = case(8, torch.float32)
    inverse = inverse.clone()
    inverse[3, 1] = TOKENS * SLOTS
    with pytest.raises(RuntimeError, match="numbers of slots and rows"):
        torch.ops.kimi_pretrain.weighted_rows(rows, weights, order, inverse)


@pytest.mark.usefixtures("native")
def test_opcheck() -> None:
    """Catches a schema, a fake shape or an autograd kernel that torch.compile would trip over."""
    ops = torch.ops.kimi_pretrain
    rows, weights, order, inverse, grad = case(8, torch.float32)
    torch.library.opcheck(ops.take_rows, (grad.clone().requires_grad_(), order, inverse))
    torch.library.opcheck(ops.summed_rows, (rows.clone().requires_grad_(), order, inverse))
    leaves = (rows.clone().requires_grad_(), weights.clone().requires_grad_())
    torch.library.opcheck(ops.weighted_rows, (*leaves, order, inverse))
    torch.library.opcheck(ops.weighted_rows_backward, (grad, rows, weights, order, inverse))
