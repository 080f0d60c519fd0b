"""Held-out batches shared out among replicas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kimi_pretrain.config import compose
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.parallel.collectives import Group, Handle
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.train.evaluate import Evaluation, evaluate

LENGTH = 16
ALONE = Group("alone")
BYTES = np.arange(257) % 5 + 1  # bytes of text a token


class Told(Exception):
    """What a replica would add up with the others'."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums.clone()


class Listening(Group):
    def all_reduce_sum(self, tensor: Tensor) -> Handle:
        raise Told(tensor)


class Adding(Group):
    """Everyone, where the others have told their sums already."""

    def __init__(self, others: Tensor) -> None:
        super().__init__("world")
        self.others = others

    def all_reduce_sum(self, tensor: Tensor) -> Handle:
        tensor += self.others
        return Handle()


def batches() -> list[tuple[str, Batch]]:
    """Five, of two domains and three sizes, some labels not counted."""
    rng = np.random.default_rng(0)
    made = []
    for number, (domain, rows) in enumerate([("a", 2), ("b", 1), ("a", 3), ("b", 2), ("b", 1)]):
        windows = rng.integers(0, 257, (rows, LENGTH + 1))
        labels = windows[:, 1:].copy()
        labels[0, : number + 1] = -100
        made.append((domain, Batch(windows[:, :-1].copy(), labels, None)))
    return made


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_together_give_what_one_gives(replicas: int) -> None:
    """Catches a batch that the last replica repeats for its experts' sake counted twice, one that
    nobody takes, and a domain added to another's sum."""
    config = compose(["experiment=smoke", "run_dir=unused", "precision=fp64"])
    model = from_config(config.model, dtype=torch.float64)
    forward = ForwardPipeline(RankModel(config.model, {0: model}), LocalDispatcher(), ALONE)

    def of(group: Group, everyone: Group) -> Evaluation:
        return evaluate(forward, batches(), BYTES, None, group, everyone)

    alone = of(ALONE, ALONE)
    ranks = range(replicas)
    told = []
    for index in ranks:
        with pytest.raises(Told) as raised:
            of(Group("dp", ranks, index, "none"), Listening("world"))
        told.append(raised.value.sums)
    together = of(Group("dp", ranks, 0, "none"), Adding(torch.stack(told[1:]).sum(0)))
    assert together.loss == pytest.approx(alone.loss, rel=1e-12)
    assert together.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-12)
    assert together.domain_losses == pytest.approx(alone.domain_losses, rel=1e-12)
