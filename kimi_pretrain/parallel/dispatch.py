"""Bringing tokens to their experts and the results back.

A *slot* is one choice of one token: slot ``t * k + j`` is token t's j-th expert. The model
sorts slots by expert (``DispatchPlan``) and drives a ``Dispatcher`` through four steps::

    permute    [tokens, hidden] -> rows to send         local
    dispatch   rows -> rows at their experts            all-to-all
    combine    the experts' outputs -> where they came from   all-to-all
    unpermute  rows -> [tokens, hidden]                 local

Nothing is dropped or padded: an expert gets as many rows as tokens chose it, none too. A
token's router weights multiply its experts' outputs: at the token, in ``unpermute``, or
(``weights_at_experts``) before the down-projection, in which case they travel with the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kimi_pretrain.ops.permute import reorder_rows, summed_rows, take_rows, weighted_rows
from kimi_pretrain.parallel.collectives import Group


@dataclass(frozen=True)
class DispatchPlan:
    """Where every slot of a microbatch goes."""

    order: Tensor  # [tokens * k] slots in expert order, stable within an expert
    inverse: Tensor  # [tokens, k] position of each slot in that order
    counts: Tensor  # [experts] int64 slots of each expert


@dataclass(frozen=True)
class Route:
    """How rows travelled, for their way back."""

    sent: Sequence[int]  # rows to each rank of the group
    received: Sequence[int]  # rows from each rank
    order: Tensor  # [rows] arrival order to expert order
    inverse: Tensor  # [rows] expert order to arrival order


@dataclass(frozen=True)
class Arrived:
    """Rows at their experts."""

    rows: Tensor  # [rows, hidden], the rows of the first local expert first
    sizes: Sequence[int]  # rows of each local expert
    weights: Tensor | None  # [rows] router weights, where experts apply them
    route: Route | None  # None where nothing travelled


class Dispatcher(Protocol):
    """Moves rows to the ranks of their experts and back; differentiable both ways."""

    weights_at_experts: bool

    def experts(self, count: int) -> range:
        """Which of a layer's ``count`` experts this rank holds."""
        ...

    def permute(self, hidden: Tensor, plan: DispatchPlan) -> Tensor:
        """[tokens, hidden] to the rows that ``dispatch`` takes."""
        ...

    def dispatch(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Arrived:
        """Rows to the experts of this rank; ``weights`` [tokens, k] are the router's."""
        ...

    def combine(self, rows: Tensor, route: Route | None) -> Tensor:
        """Rows [rows, hidden] as they arrived, processed, back to where they came from."""
        ...

    def unpermute(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        """The weighted sum of each token's rows: [tokens, hidden]."""
        ...


class LocalDispatcher:
    """All experts on this rank: the plan's order is already the experts'."""

    def __init__(self, weights_at_experts: bool = False) -> None:
        self.weights_at_experts = weights_at_experts

    def experts(self, count: int) -> range:
        return range(count)

    def permute(self, hidden: Tensor, plan: DispatchPlan) -> Tensor:
        return take_rows(hidden, plan.order, plan.inverse)

    def dispatch(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Arrived:
        own = slot_weights(weights, plan) if self.weights_at_experts else None
        return Arrived(rows, plan.counts.tolist(), own, None)

    def combine(self, rows: Tensor, route: Route | None) -> Tensor:
        del route
        return rows

    def unpermute(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        if self.weights_at_experts:
            return summed_rows(rows, plan.order, plan.inverse)
        return weighted_rows(rows, weights, plan.order, plan.inverse)


class AllToAllDispatcher(LocalDispatcher):
    """Experts spread evenly over a group, rank r holding the r-th run of them.

    One exchange of counts tells every rank what will arrive; then rows travel in one uneven
    all-to-all each way. Ranks send in expert order, so what arrives is sorted by sender and
    then by expert; ``Route`` keeps the permutation between that and expert order.
    """

    def __init__(self, group: Group, weights_at_experts: bool = False) -> None:
        super().__init__(weights_at_experts)
        self.group = group

    def experts(self, count: int) -> range:
        each = count // self.group.size
        return range(self.group.index * each, (self.group.index + 1) * each)

    def dispatch(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Arrived:
        counts = plan.counts.view(self.group.size, -1)  # [ranks, local experts]
        arriving = torch.empty_like(counts)
        self.group.all_to_all(arriving, counts).wait()
        sent = counts.sum(1)
        received, sizes = arriving.sum(1), arriving.sum(0)
        order = expert_order(arriving)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        route = Route(sent.tolist(), received.tolist(), order, inverse)
        own = None
        if self.weights_at_experts:
            column = slot_weights(weights, plan)[:, None]
            own = self._to_experts(column, route)[:, 0]
        return Arrived(self._to_experts(rows, route), sizes.tolist(), own, route)

    def combine(self, rows: Tensor, route: Route | None) -> Tensor:
        assert route is not None
        rows = reorder_rows(rows, route.inverse, route.order)
        return all_to_all_rows(rows, self.group, route.received, route.sent)

    def _to_experts(self, rows: Tensor, route: Route) -> Tensor:
        arrived = all_to_all_rows(rows, self.group, route.sent, route.received)
        return reorder_rows(arrived, route.order, route.inverse)


def plan_dispatch(indices: Tensor, experts: int) -> DispatchPlan:
    """Sort the slots of ``indices`` [tokens, k] (expert of each slot) by expert."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    counts = torch.bincount(flat, minlength=experts)
    return DispatchPlan(order, inverse.view_as(indices), counts)


def slot_weights(weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Router weights [tokens, k] in the plan's order: [tokens * k]."""
    return weights.reshape(-1).index_select(0, plan.order)


def expert_order(arriving: Tensor) -> Tensor:
    """The permutation that sorts arrived rows by expert, senders in order within an expert.

    Args:
        arriving: [ranks, experts] int64, rows of each local expert from each rank.

    Returns:
        [rows] int64, positions in arrival order (by rank, then expert).
    """
    lengths = arriving.t().reshape(-1)  # [experts * ranks], blocks in expert order
    blocks = arriving.reshape(-1)
    starts = (blocks.cumsum(0) - blocks).view_as(arriving).t().reshape(-1)  # where each lies
    shift = starts - (lengths.cumsum(0) - lengths)
    rows = torch.arange(int(lengths.sum()), device=arriving.device)
    return rows + shift.repeat_interleave(lengths)


def all_to_all_rows(
    rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]
) -> Tensor:
    """Uneven all-to-all of rows [sum(sent), width] to [sum(received), width]."""
    return _AllToAllRows.apply(rows, group, sent, received)  # type: ignore[no-any-return, no-untyped-call]


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _travel(rows, group, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _travel(grads[0], ctx.group, ctx.received, ctx.sent), None, None, None


def _travel(rows: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    group.all_to_all(arrived, rows.contiguous(), received, sent).wait()
    return arrived
