"""Dispatch and combine through DeepEP's kernels (NVLink and RDMA), in place of all-to-all.

DeepEP (github.com/deepseek-ai/DeepEP, the ``deep_ep.Buffer`` of its normal kernels) sends a
token once to each rank that holds any of its experts and sums what comes back on the way, so
that a token's k copies never cross a slow link. Hence it takes tokens, not slots: rows are
sorted by expert where they arrive, and router weights act before the down-projection.

Compiled, not run: DeepEP needs GPUs. Its semantics are held against all-to-all by a stand-in
of its ``Buffer`` in the tests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import Arrived, DispatchPlan, Flight, Route, Rows


@dataclass(frozen=True)
class DeepEPRoute(Route):
    """A DeepEP handle and the permutation on the receiving rank."""

    handle: Any
    order: Tensor  # [rows] slot (received token * k + j) of each row, in expert order
    inverse: Tensor  # [received, k] row of each slot; the number of rows where it is not here

    @property
    def tokens(self) -> Tensor:
        """[rows] the received token of each row."""
        return self.order // self.inverse.shape[1]


class DeepEPDispatcher:
    """Experts spread evenly over a group, rank r holding the r-th run of them."""

    weights_at_experts = True

    def __init__(self, group: Group, buffer: Any) -> None:
        """A dispatcher over ``buffer``, a ``deep_ep.Buffer`` of the group's ranks."""
        self.group, self.buffer = group, buffer

    def experts(self, count: int) -> range:
        each = count // self.group.size
        return range(self.group.index * each, (self.group.index + 1) * each)

    def permute(self, hidden: Tensor, weights: Tensor, plan: DispatchPlan) -> Rows:
        del plan
        return hidden, weights  # as tokens: [tokens, hidden], [tokens, k]

    def dispatch(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Flight[Arrived]:
        assert weights is not None
        # plan.inverse is [tokens, k] positions in expert order; back to the experts themselves
        count = len(plan.counts)
        experts = torch.arange(count, device=rows.device).repeat_interleave(plan.counts)
        indices = experts[plan.inverse]  # [tokens, k] int64
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            indices, count
        )
        received, local, arrived_weights, sizes, handle, _ = self.buffer.dispatch(
            rows,
            topk_idx=indices,
            topk_weights=weights.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        route = DeepEPRoute(handle, *slots_by_expert(local))
        own = arrived_weights.reshape(-1)[route.order].to(weights.dtype)
        arrived = Arrived(received.index_select(0, route.tokens), sizes, own, route)
        return Flight((), lambda: arrived)

    def send(self, rows: Tensor, route: Route) -> Flight[Tensor]:
        assert isinstance(route, DeepEPRoute)
        received = self.buffer.dispatch(rows.contiguous(), handle=route.handle)[0]
        return Flight((), lambda: received.index_select(0, route.tokens))

    def send_back(self, rows: Tensor, weights: Tensor | None, route: Route) -> Flight[Rows]:
        assert isinstance(route, DeepEPRoute)
        summed = _sum(rows, route.inverse)
        slots = None
        if weights is not None:
            slots = torch.cat([weights, weights.new_zeros(1)])[route.inverse].float()
        combined, back, _ = self.buffer.combine(summed, route.handle, topk_weights=slots)
        return Flight((), lambda: (combined, None if weights is None else back.to(weights.dtype)))

    def unpermute(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        del weights, plan  # applied at the experts; summed on the way
        return rows


def open_deepep(group: Group, hidden_bytes: int) -> DeepEPDispatcher:
    """A dispatcher with buffers for rows of ``hidden_bytes``.

    Raises:
        ConfigError: the package is not installed, or there is no GPU.
    """
    if group.device.type != "cuda":
        rule = "DeepEP's kernels run on NVIDIA GPUs"
        raise ConfigError("parallel.dispatcher", "deepep", rule, "parallel.dispatcher=all_to_all")
    try:
        from deep_ep import Buffer
    except ModuleNotFoundError as error:
        rule = f"it needs the package deep_ep, built from its source ({error})"
        fix = "parallel.dispatcher=all_to_all"
        raise ConfigError("parallel.dispatcher", "deepep", rule, fix) from error
    configs = (
        Buffer.get_dispatch_config(group.size),
        Buffer.get_combine_config(group.size),
    )
    nvlink = max(c.get_nvl_buffer_size_hint(hidden_bytes, group.size) for c in configs)
    rdma = max(c.get_rdma_buffer_size_hint(hidden_bytes, group.size) for c in configs)
    return DeepEPDispatcher(group, Buffer(group.process_group, nvlink, rdma))


def slots_by_expert(local: Tensor) -> tuple[Tensor, Tensor]:
    """Sort a received token's slots by local expert; slots of other ranks' experts drop out.

    Args:
        local: [received, k] local expert of each slot, -1 where it is another rank's.

    Returns:
        [rows] the slots in expert order, stable; and [received, k] the row of each slot,
        ``rows`` (one past the end) where there is none.
    """
    flat = local.reshape(-1)
    here = (flat >= 0).nonzero()[:, 0]
    order = here[torch.argsort(flat[here], stable=True)]
    inverse = torch.full_like(flat, order.shape[0])
    inverse[order] = torch.arange(order.shape[0], device=flat.device)
    return order, inverse.view_as(local)


def _sum(rows: Tensor, inverse: Tensor) -> Tensor:
    """[rows, width] to [received, width]; slots that are not here add a row of zeros."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    high = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = padded.index_select(0, inverse[:, 0]).to(high)
    for column in inverse.unbind(1)[1:]:
        total += padded.index_select(0, column)
    return total.to(rows.dtype)
