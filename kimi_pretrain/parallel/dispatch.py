"""Bringing tokens to their experts and the results back.

A *slot* is one choice of one token: slot ``t * k + j`` is token t's j-th expert. The model
sorts slots by expert (``DispatchPlan``) and drives a ``Dispatcher`` through four steps::

    permute    [tokens, hidden] -> rows to send               local, differentiable
    dispatch   rows -> rows at their experts                  all-to-all
    send_back  the experts' outputs -> where they came from   all-to-all
    unpermute  rows -> [tokens, hidden]                       local, differentiable

The all-to-alls take plain tensors and give a ``Flight`` each, so that a schedule computes
something else meanwhile. What brings rows there and what brings them back are each other's
transpose: gradients of ``dispatch`` travel by ``send_back``, those of ``send_back`` by
``send``. ``dispatched`` and ``sent_back`` are both with a gradient, for a forward that is run
straight through.

Nothing is dropped or padded: an expert gets as many rows as tokens chose it, none too. A
token's router weights multiply its experts' outputs: at the token, in ``unpermute``, or
(``weights_at_experts``) before the down-projection, in which case they travel with the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.parallel.collectives import Group, Handle


@dataclass(frozen=True)
class DispatchPlan:
    """Where every slot of a microbatch goes."""

    order: Tensor  # [tokens * k] slots in expert order, stable within an expert
    inverse: Tensor  # [tokens, k] position of each slot in that order
    counts: Tensor  # [experts] int64 slots of each expert


@dataclass(frozen=True)
class Route:
    """How rows travelled, for their way back; within one rank they did not."""


@dataclass(frozen=True)
class TravelledRoute(Route):
    """The way through an all-to-all."""

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
    route: Route


T = TypeVar("T", covariant=True)


class Flight(Generic[T]):
    """Rows on their way; ``wait`` gives what arrived, once."""

    def __init__(self, handles: Sequence[Handle], land: Callable[[], T]) -> None:
        self._handles = handles
        self._land: Callable[[], T] | None = land

    @property
    def flies(self) -> bool:
        """Whether anything leaves this rank in a way that can be awaited."""
        return bool(self._handles)

    @property
    def done(self) -> bool:
        """Whether ``arrive`` would return at once."""
        return all(handle.done for handle in self._handles)

    def arrive(self) -> None:
        """Return when everything is there; again and again without harm.

        Raises:
            PeerError: it did not come before the deadline.
        """
        for handle in self._handles:
            handle.wait()

    def wait(self) -> T:
        """What arrived; the flight keeps nothing of it.

        Raises:
            PeerError: it did not before the deadline.
        """
        self.arrive()
        land, self._land = self._land, None
        assert land is not None, "a flight lands once"
        return land()


Rows = tuple[Tensor, Tensor | None]  # rows [rows, hidden], the weights that travel with them


class Dispatcher(Protocol):
    """Moves rows to the ranks of their experts and back."""

    weights_at_experts: bool

    def experts(self, count: int) -> range:
        """Which of a layer's ``count`` experts this rank holds."""
        ...

    def permute(self, hidden: Tensor, weights: Tensor, plan: DispatchPlan) -> Rows:
        """What ``dispatch`` takes, of [tokens, hidden] and router weights [tokens, k].

        Differentiable. The weights are None where they do not travel.
        """
        ...

    def dispatch(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Flight[Arrived]:
        """What ``permute`` gave, to the experts' ranks."""
        ...

    def send(self, rows: Tensor, route: Route) -> Flight[Tensor]:
        """Rows the way of an earlier ``dispatch``: the gradient of ``send_back``."""
        ...

    def send_back(self, rows: Tensor, weights: Tensor | None, route: Route) -> Flight[Rows]:
        """Rows as they arrived, processed, to where they came from.

        With ``weights`` [rows] the gradient of ``dispatch``: what comes back has the shapes
        that ``permute`` gave.
        """
        ...

    def unpermute(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        """The weighted sum of each token's rows: [tokens, hidden]; differentiable."""
        ...


class LocalDispatcher:
    """All experts on this rank: the plan's order is already the experts'."""

    def __init__(self, weights_at_experts: bool = False, kernels: Kernels = REFERENCE) -> None:
        self.weights_at_experts, self.kernels = weights_at_experts, kernels

    def experts(self, count: int) -> range:
        return range(count)

    def permute(self, hidden: Tensor, weights: Tensor, plan: DispatchPlan) -> Rows:
        own = slot_weights(weights, plan) if self.weights_at_experts else None
        return self.kernels.take_rows(hidden, plan.order, plan.inverse), own

    def dispatch(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Flight[Arrived]:
        return Flight((), lambda: Arrived(rows, plan.counts.tolist(), weights, Route()))

    def send(self, rows: Tensor, route: Route) -> Flight[Tensor]:
        del route
        return Flight((), lambda: rows)

    def send_back(self, rows: Tensor, weights: Tensor | None, route: Route) -> Flight[Rows]:
        del route
        return Flight((), lambda: (rows, weights))

    def unpermute(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        if self.weights_at_experts:
            total: Tensor = self.kernels.summed_rows(rows, plan.order, plan.inverse)
        else:
            total = self.kernels.weighted_rows(rows, weights, plan.order, plan.inverse)
        return total


class AllToAllDispatcher(LocalDispatcher):
    """Experts spread evenly over a group, rank r holding the r-th run of them.

    One exchange of counts tells every rank what will arrive; then rows travel in one uneven
    all-to-all each way. Ranks send in expert order, so what arrives is sorted by sender and
    then by expert; ``Route`` keeps the permutation between that and expert order.
    """

    def __init__(
        self, group: Group, weights_at_experts: bool = False, kernels: Kernels = REFERENCE
    ) -> None:
        super().__init__(weights_at_experts, kernels)
        self.group = group

    def experts(self, count: int) -> range:
        each = count // self.group.size
        return range(self.group.index * each, (self.group.index + 1) * each)

    def dispatch(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Flight[Arrived]:
        counts = plan.counts.view(self.group.size, -1)  # [ranks, local experts]
        arriving = torch.empty_like(counts)
        self.group.all_to_all(arriving, counts, name="counts").wait()
        order = expert_order(arriving)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        route = TravelledRoute(counts.sum(1).tolist(), arriving.sum(1).tolist(), order, inverse)
        sizes = arriving.sum(0).tolist()
        arrived, flying = self._travel(rows, route.sent, route.received)
        handles = [flying]
        column = None
        if weights is not None:
            column, also = self._travel(weights[:, None], route.sent, route.received)
            handles.append(also)

        def land() -> Arrived:
            own = None if column is None else column[:, 0].index_select(0, order)
            return Arrived(arrived.index_select(0, order), sizes, own, route)

        return Flight(handles, land)

    def send(self, rows: Tensor, route: Route) -> Flight[Tensor]:
        assert isinstance(route, TravelledRoute)
        arrived, flying = self._travel(rows, route.sent, route.received)
        return Flight([flying], lambda: arrived.index_select(0, route.order))

    def send_back(self, rows: Tensor, weights: Tensor | None, route: Route) -> Flight[Rows]:
        assert isinstance(route, TravelledRoute)
        inverse = route.inverse
        back, flying = self._travel(rows.index_select(0, inverse), route.received, route.sent)
        handles = [flying]
        column = None
        if weights is not None:
            own = weights.index_select(0, inverse)[:, None]
            column, also = self._travel(own, route.received, route.sent)
            handles.append(also)
        return Flight(handles, lambda: (back, None if column is None else column[:, 0]))

    def _travel(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> tuple[Tensor, Handle]:
        arrived = rows.new_empty(sum(received), rows.shape[1])
        return arrived, self.group.all_to_all(arrived, rows.contiguous(), received, sent)


def dispatched(
    dispatcher: Dispatcher, rows: Tensor, weights: Tensor | None, plan: DispatchPlan
) -> Arrived:
    """``dispatch`` and its landing, differentiable in rows and weights."""
    got: list[Arrived] = []
    arrived, own = _Dispatched.apply(rows, weights, plan, dispatcher, got)  # type: ignore[no-untyped-call]
    return replace(got[0], rows=arrived, weights=own)


def sent_back(dispatcher: Dispatcher, rows: Tensor, route: Route) -> Tensor:
    """``send_back`` and its landing, differentiable."""
    return _SentBack.apply(rows, route, dispatcher)  # type: ignore[no-any-return, no-untyped-call]


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor | None,
        plan: DispatchPlan,
        dispatcher: Dispatcher,
        got: list[Arrived],
    ) -> tuple[Tensor, Tensor | None]:
        arrived = dispatcher.dispatch(rows, weights, plan).wait()
        got.append(arrived)
        ctx.dispatcher, ctx.route = dispatcher, arrived.route
        return arrived.rows.view_as(arrived.rows), arrived.weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.dispatcher.send_back(grads[0], grads[1], ctx.route).wait()
        return rows, weights, None, None, None


class _SentBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, dispatcher: Dispatcher) -> Tensor:
        ctx.dispatcher, ctx.route = dispatcher, route
        back: Tensor = dispatcher.send_back(rows, None, route).wait()[0]
        return back.view_as(back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dispatcher.send(grads[0], ctx.route).wait(), None, None


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
