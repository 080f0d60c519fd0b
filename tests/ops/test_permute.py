"""Taking rows to expert order and weighted rows back, against indexing."""

import torch

from kimi_pretrain.ops.permute import take_rows, weighted_rows
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
