"""A small model and batch that the tests of several ranks share."""

from typing import Any

import numpy as np
import torch

from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.parallel.world import World, open_world
from kimi_pretrain.train.step import TrainStep

SEQUENCES, LENGTH, RATE = 16, 12, 1e-2


def configuration(dp: int, ep: int, *overrides: str) -> Config:
    """Eight experts, four layers, 16 sequences a step."""
    return compose(
        [
            "experiment=smoke",
            "precision=fp64",
            "run_dir=unused",
            "model.n_routed_experts=8",
            "model.aux_loss_alpha=0.01",
            f"schedule.global_batch_size={SEQUENCES}",
            "schedule.micro_batch_size=1",
            f"parallel.dp={dp}",
            f"parallel.ep={ep}",
            "parallel.timeout_seconds=60",
            *overrides,
        ]
    )


def batch() -> Batch:
    """A global batch whose rows differ in how many labels they have."""
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 257, (SEQUENCES, LENGTH + 1))
    labels = windows[:, 1:].copy()
    for row in range(SEQUENCES):
        labels[row, : row % 5] = -100
    documents = np.zeros((SEQUENCES, LENGTH), np.int32)
    documents[:, LENGTH // 3 :] = 1
    return Batch(windows[:, :-1].copy(), labels, documents)


def part_of(world: World) -> Batch:
    """This replica's rows of ``batch``."""
    whole, each = batch(), SEQUENCES // world.dp.size
    rows = slice(world.dp.index * each, (world.dp.index + 1) * each)
    assert whole.document_ids is not None
    return Batch(whole.tokens[rows], whole.labels[rows], whole.document_ids[rows])


def open_step(config: Config, dtype: torch.dtype, world: World | None = None) -> TrainStep:
    """The step of one rank, with a fresh model."""
    return TrainStep.open(config, dtype, world or open_world(config.parallel))


def put_together(pieces: list[Any]) -> dict[str, torch.Tensor]:
    """Whole tensors by "kind/name" of all ranks' pieces, each element held exactly once."""
    tensors: dict[str, torch.Tensor] = {}
    holders: dict[str, torch.Tensor] = {}
    for kind, name, shape, start, values in pieces:
        key = f"{kind}/{name}"
        tensor = tensors.setdefault(key, torch.zeros(shape, dtype=values.dtype))
        count = holders.setdefault(key, torch.zeros(shape, dtype=torch.int64))
        tensor.view(-1)[start : start + values.numel()] = values
        count.view(-1)[start : start + values.numel()] += 1
    for key in tensors:
        assert bool((holders[key] == 1).all()), f"{key} is held twice or not at all"
    return tensors
