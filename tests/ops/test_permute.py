"""Taking rows to expert order and (weighted) rows back, against indexing."""

import torch

from kimi_pretrain.ops.permute import reorder_rows, summed_rows, take_rows, weighted_rows
from kimi_pretrain.parallel.dispatch import plan_dispatch


def test_both_ways_equal_indexing() -> None:
    """A slot taken for a token, or a gradient that keeps only one of a token's k rows."""
    torch.manual_seed(0)
    tokens, k, experts, width = 7, 3, 5, 4
    indices = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    plan = plan_dispatch(indices, experts)
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, k, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(experts, 1, dtype=torch.float64)
    by_row = scale.repeat_interleave(plan.counts, dim=0)  # an expert that scales

    rows = take_rows(x, plan.order, plan.inverse)
    got = weighted_rows(rows * by_row, weights, plan.order, plan.inverse)
    want = (weights[:, :, None] * x[:, None, :] * scale[indices]).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    grad = torch.randn(tokens, width, dtype=torch.float64)
    for g, w in zip(
        torch.autograd.grad(got, [x, weights], grad),
        torch.autograd.grad(want, [x, weights], grad),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)


def test_bf16_rows_are_weighted_and_summed_in_fp32() -> None:
    """A weight or a partial sum rounded to bf16 gives another bf16 in many elements."""
    torch.manual_seed(0)
    tokens, k = 50, 8
    plan = plan_dispatch(torch.arange(k).expand(tokens, k), k)
    rows = torch.randn(tokens * k, 16).bfloat16()
    weights = torch.rand(tokens, k)
    got = weighted_rows(rows, weights, plan.order, plan.inverse)
    want = (weights[:, :, None].double() * rows[plan.inverse].double()).sum(1)
    assert (got == want.bfloat16()).double().mean() > 0.999


def test_summed_rows_is_a_weighted_sum_with_ones() -> None:
    """Catches a token that gets another's rows where weights act at the experts."""
    torch.manual_seed(0)
    plan = plan_dispatch(torch.tensor([[1, 0], [2, 1], [0, 2]]), 3)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    got = summed_rows(rows, plan.order, plan.inverse)
    ones = torch.ones(3, 2, dtype=torch.float64)
    want = weighted_rows(rows, ones, plan.order, plan.inverse)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    grad = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, rows, grad), torch.autograd.grad(want, rows, grad)
    )


def test_reordering_has_the_inverse_as_its_gradient() -> None:
    """Catches a backward that permutes the same way once more."""
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([2, 0, 3, 1])
    inverse = torch.argsort(order)
    got = reorder_rows(x, order, inverse)
    assert torch.equal(got, x[order])
    grad = torch.randn(4, 2, dtype=torch.float64)
    (back,) = torch.autograd.grad(got, x, grad)
    assert torch.equal(back, grad[inverse])
