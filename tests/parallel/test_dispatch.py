"""Sorting slots by expert, and the one-rank dispatcher."""

import torch

from kimi_pretrain.parallel.dispatch import LocalDispatcher, plan_dispatch


def test_plan_sorts_slots_by_expert_and_back() -> None:
    """An unstable sort would make sums, and with them a resumed run, differ in the last bit."""
    indices = torch.tensor([[2, 0], [0, 3], [2, 3]])
    plan = plan_dispatch(indices, experts=5)
    assert plan.order.tolist() == [1, 2, 0, 4, 3, 5]
    assert plan.counts.tolist() == [2, 0, 2, 2, 0]
    assert plan.inverse.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_one_rank_keeps_rows_where_they_are() -> None:
    plan = plan_dispatch(torch.tensor([[1], [0], [1]]), experts=3)
    rows = torch.randn(3, 4)
    arrived = LocalDispatcher().dispatch(rows, plan)
    assert arrived.rows is rows
    assert list(arrived.sizes) == [1, 2, 0]
    assert LocalDispatcher().combine(rows, plan) is rows
