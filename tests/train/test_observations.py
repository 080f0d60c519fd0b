"""Combining a step's record: what a single rank must keep as it is."""

import pytest
import torch

from kimi_pretrain.config import compose
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.observations import Observations
from tests.distributed.ranks import run_ranks


def record_of(rank: int) -> StepRecord:
    """Rank 0 has the larger bounds, rank 1 the larger exact maxima of heads 1 and 2."""
    cfg = compose(["experiment=smoke", "run_dir=x", "model.n_routed_experts=8"]).model
    record = StepRecord.for_model(cfg, tau=100.0, dtype=torch.float64)
    heads = torch.tensor([[50.0, 90.0], [-3.0, 20.0]])[rank]
    record.max_logits[0] = heads
    record.max_logits[1] = torch.tensor([[60.0, 99.0], [130.0, 99.0]], dtype=torch.float64)[rank]
    record.exact[1, 0] = rank == 1
    record.exact[1, 1] = rank == 0
    record.expert_counts += 10**12 + rank
    record.aux_loss += 0.5
    record.tokens = 7
    return record


def test_one_rank_keeps_its_record() -> None:
    """Catches a combination that sums, rounds or forgets where there is nothing to combine."""
    want, record = record_of(0), record_of(0)
    loss, stop = Observations(record, torch.tensor(1.25), True, Group("dp")).combined()
    assert (loss, stop, record.tokens) == (1.25, True, 7)
    for name in ("max_logits", "exact", "expert_counts", "aux_loss"):
        assert torch.equal(getattr(record, name), getattr(want, name)), name


def combine(rank: int, world_size: int) -> tuple[float, bool, StepRecord]:
    config = compose(["experiment=smoke", "run_dir=x", f"parallel.dp={world_size}"])
    world = open_world(config.parallel)
    record = record_of(rank)
    loss = torch.tensor(0.25 + rank, dtype=torch.float64)
    return *Observations(record, loss, rank == 1, world.dp).combined(), record


def test_ranks_take_maxima_and_sums() -> None:
    """Catches a bound that hides another rank's exact maximum or is taken for exact, counts in
    fp32 (10^12 + 1 is lost there), and a stop that only one rank hears of."""
    for loss, stop, record in run_ranks(2, combine):
        assert loss == pytest.approx(1.5, rel=1e-15)
        assert stop
        assert record.tokens == 14
        assert record.max_logits[0].tolist() == [50.0, 90.0]
        assert not record.exact[0].any()
        assert record.max_logits[1].tolist() == [130.0, 99.0]
        assert record.exact[1].tolist() == [True, True]
        assert (record.expert_counts == 2 * 10**12 + 1).all()
        assert (record.aux_loss == 1.0).all()
