"""The DeepEP adapter over a stand-in of ``deep_ep.Buffer`` that has its contract, on gloo."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.model.mlp import Experts
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.deepep import DeepEPDispatcher, open_deepep, slots_by_expert
from kimi_pretrain.parallel.dispatch import (
    AllToAllDispatcher,
    Dispatcher,
    dispatched,
    plan_dispatch,
    sent_back,
)
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks

TOKENS, EXPERTS, K, WIDTH = 7, 6, 3, 8


class BufferStandIn:
    """A token goes once to each rank of its experts; combine sums what comes back."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def get_dispatch_layout(self, topk_idx: Tensor, experts: int) -> tuple[Any, ...]:
        self.each = experts // self.group.size
        ranks = torch.arange(self.group.size)
        in_rank = (topk_idx[:, :, None] // self.each == ranks).any(1)  # [tokens, ranks]
        per_expert = torch.bincount(topk_idx.flatten(), minlength=experts)
        return in_rank.sum(0), None, per_expert, in_rank, None

    def dispatch(self, x: Tensor, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        if handle is None:
            in_rank = given["is_token_in_rank"]
            source = [in_rank[:, r].nonzero()[:, 0] for r in range(self.group.size)]
            sent = [len(s) for s in source]
            received = self._counts(sent)
            handle = (source, sent, received, x.shape[0])
        source, sent, received, _ = handle
        out = self._travel(x[torch.cat(source)], sent, received)
        if "topk_idx" not in given:
            return out, None, None, None, handle, None
        index = self._travel(given["topk_idx"][torch.cat(source)], sent, received)
        local = index - self.group.index * self.each
        mine = (local >= 0) & (local < self.each)
        weights = self._travel(given["topk_weights"][torch.cat(source)], sent, received)
        local = torch.where(mine, local, -1)
        sizes = torch.bincount(local[mine], minlength=self.each).tolist()
        return out, local, torch.where(mine, weights, 0.0), sizes, handle, None

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None
    ) -> tuple[Any, ...]:
        source, sent, received, tokens = handle
        result = []
        for value in (x, topk_weights):
            if value is None:
                result.append(None)
                continue
            back = self._travel(value, received, sent)
            total = value.new_zeros(tokens, value.shape[1])
            result.append(total.index_add_(0, torch.cat(source), back))
        return *result, None

    def _counts(self, sent: list[int]) -> list[int]:
        told = torch.empty(self.group.size, dtype=torch.int64)
        self.group.all_to_all(told, torch.tensor(sent)).wait()
        counts: list[int] = told.tolist()
        return counts

    def _travel(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty(sum(received), x.shape[1])
        self.group.all_to_all(out, x.contiguous(), received, sent).wait()
        return out


def both_ways(rank: int, world_size: int) -> list[tuple[str, Tensor, Tensor]]:
    config = compose(
        ["experiment=smoke", "run_dir=x", f"parallel.dp={world_size}", f"parallel.ep={world_size}"]
    )
    group = open_world(config.parallel).ep
    results = []
    for dispatcher in (
        AllToAllDispatcher(group, weights_at_experts=True),
        DeepEPDispatcher(group, BufferStandIn(group)),
    ):
        results.append(_layer(dispatcher, rank))
    names = ["output", "gradient of hidden", "of weights", "of gate_up", "of down"]
    return list(zip(names, *results, strict=True))


def _layer(dispatcher: Dispatcher, rank: int) -> list[Tensor]:
    torch.manual_seed(1 + rank)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, K, dtype=torch.float64).float().double().requires_grad_()
    indices = torch.stack([torch.randperm(EXPERTS - 1)[:K] for _ in range(TOKENS)])  # 5: nobody
    experts = Experts(len(dispatcher.experts(EXPERTS)), WIDTH, 4, torch.float64)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    grad = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    plan = plan_dispatch(indices, EXPERTS)
    arrived = dispatched(dispatcher, *dispatcher.permute(hidden, weights, plan), plan)
    rows = sent_back(dispatcher, experts(arrived), arrived.route)
    out = dispatcher.unpermute(rows, weights, plan)
    out.backward(grad)
    grads = [hidden.grad, weights.grad, *(p.grad for p in experts.parameters())]
    return [out.detach(), *(g for g in grads if g is not None)]


def test_it_computes_what_all_to_all_does() -> None:
    """Catches slots of other ranks' experts taken for local ones, a token's rows summed twice,
    and gradients of router weights that do not find their way back."""
    for rank, results in enumerate(run_ranks(3, both_ways)):
        assert len(results) == 5
        for name, want, got in results:
            # DeepEP carries router weights and their gradients in fp32.
            tolerance = 1e-6 if name == "of weights" else 1e-9
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=1e-12, msg=lambda m, n=name, r=rank: f"{r} {n}: {m}"
            )


def test_slots_are_sorted_by_local_expert() -> None:
    """Catches rows of absent slots, which would reach an expert."""
    local = torch.tensor([[1, -1], [0, 1], [-1, -1]])
    order, inverse = slots_by_expert(local)
    assert order.tolist() == [2, 0, 3]
    assert inverse.tolist() == [[1, 3], [0, 2], [3, 3]]


def test_without_a_gpu_it_is_refused_in_one_line() -> None:
    """Catches a fall-back to another dispatcher that nobody asked for."""
    with pytest.raises(ConfigError, match=r"parallel\.dispatcher.*GPUs.*all_to_all"):
        open_deepep(Group("ep"), 64)
