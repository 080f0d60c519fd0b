"""Sorting slots by expert, the one-rank dispatcher, and the order of what arrives."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_pretrain.parallel.collectives import Handle
from kimi_pretrain.parallel.dispatch import Flight, LocalDispatcher, expert_order, plan_dispatch


def test_plan_sorts_slots_by_expert_and_back() -> None:
    """An unstable sort would make sums, and with them a resumed run, differ in the last bit."""
    indices = torch.tensor([[2, 0], [0, 3], [2, 3]])
    plan = plan_dispatch(indices, experts=5)
    assert plan.order.tolist() == [1, 2, 0, 4, 3, 5]
    assert plan.counts.tolist() == [2, 0, 2, 2, 0]
    assert plan.inverse.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_one_rank_keeps_rows_where_they_are() -> None:
    plan = plan_dispatch(torch.tensor([[1], [0], [1]]), experts=3)
    rows, weights = torch.randn(3, 4), torch.rand(3, 1)
    local = LocalDispatcher()
    assert local.permute(rows, weights, plan)[1] is None
    arrived = local.dispatch(rows, None, plan).wait()
    assert arrived.rows is rows
    assert list(arrived.sizes) == [1, 2, 0]
    assert arrived.weights is None
    assert local.send_back(rows, None, arrived.route).wait() == (rows, None)
    assert local.send(rows, arrived.route).wait() is rows


def test_weights_at_experts_are_in_the_rows_order() -> None:
    """Catches weights of token order beside rows of expert order."""
    plan = plan_dispatch(torch.tensor([[1, 0], [0, 2]]), experts=3)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    local = LocalDispatcher(weights_at_experts=True)
    hidden = torch.randn(2, 4)
    arrived = local.dispatch(*local.permute(hidden, weights, plan), plan).wait()
    assert arrived.weights is not None
    assert torch.equal(arrived.weights, torch.tensor([0.2, 0.3, 0.1, 0.4]))
    total = local.unpermute(arrived.rows * arrived.weights[:, None], weights, plan)
    torch.testing.assert_close(total, hidden * weights.sum(1, keepdim=True))


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=5
        )
    )
)
def test_arrived_rows_are_sorted_by_expert_then_by_sender(counts: list[list[int]]) -> None:
    """Catches an order that mixes senders, or one that fails on empty experts and ranks."""
    arriving = torch.tensor(counts)  # [ranks, experts]
    ranks, experts = arriving.shape
    labels = [
        (expert, rank, i)
        for rank in range(ranks)
        for expert in range(experts)
        for i in range(counts[rank][expert])
    ]
    order = expert_order(arriving).tolist()
    assert [labels[i] for i in order] == sorted(labels)


class _Awaited(Handle):
    """Done once it has been awaited; says how often."""

    waits = 0

    @property
    def done(self) -> bool:
        return self.waits > 0

    def wait(self) -> None:
        self.waits += 1


def test_a_flight_lands_once_and_keeps_nothing() -> None:
    """Catches arrived rows that live on, in arrival order, as long as a layer's forward: whoever
    started a flight still has it in a variable."""
    handles = [_Awaited(), _Awaited()]
    rows = torch.ones(3)
    alive = weakref.ref(rows)

    def land(rows: torch.Tensor = rows) -> torch.Tensor:
        return rows * 2

    flight = Flight(handles, land)
    del rows, land
    assert flight.flies
    assert not flight.done
    flight.arrive()
    assert flight.done
    assert alive() is not None
    assert torch.equal(flight.wait(), torch.full((3,), 2.0))
    assert alive() is None
    with pytest.raises(AssertionError, match="lands once"):
        flight.wait()
    assert not Flight((), lambda: None).flies
