"""Bringing tokens to their experts and the results back.

A *slot* is one choice of one token: slot ``t * k + j`` is token t's j-th expert. The model
sorts slots by expert (``DispatchPlan``) and hands rows in that order to a ``Dispatcher``,
which moves them to wherever the experts live. With one rank they live here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Where every slot of a microbatch goes."""

    order: Tensor  # [tokens * k] slots in expert order, stable within an expert
    inverse: Tensor  # [tokens, k] position of each slot in that order
    counts: Tensor  # [experts] int64 slots of each expert


@dataclass(frozen=True)
class Arrived:
    """Rows at their experts."""

    rows: Tensor  # [rows, hidden], the rows of the first local expert first
    sizes: Sequence[int]  # rows of each local expert


class Dispatcher(Protocol):
    """Moves rows to the ranks of their experts and back; differentiable both ways."""

    def dispatch(self, rows: Tensor, plan: DispatchPlan) -> Arrived:
        """Rows [tokens * k, hidden] in the plan's order to the experts of this rank."""
        ...

    def combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """Rows as they arrived, processed, back into the plan's order."""
        ...


class LocalDispatcher:
    """All experts on this rank: the plan's order is already the experts'."""

    def dispatch(self, rows: Tensor, plan: DispatchPlan) -> Arrived:
        return Arrived(rows, plan.counts.tolist())

    def combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        del plan
        return rows


def plan_dispatch(indices: Tensor, experts: int) -> DispatchPlan:
    """Sort the slots of ``indices`` [tokens, k] (expert of each slot) by expert."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    counts = torch.bincount(flat, minlength=experts)
    return DispatchPlan(order, inverse.view_as(indices), counts)
