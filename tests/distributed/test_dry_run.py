"""What a dry run counts of a rank is what that rank sends, calls and holds in a real world."""

from typing import Any

import pytest
import torch

from kimi_pretrain.config.schema import Config
from kimi_pretrain.dry_run.rank import dry_run_rank
from kimi_pretrain.dry_run.step import balance
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import LENGTH, RATE, configuration, open_step, part_of

# (pp, vpp, dp, ep) and how dense matrices are sharded
SHAPES = [((2, 1, 2, 2), "flat"), ((2, 2, 2, 1), "aligned")]


def configured(shape: tuple[int, int, int, int], sharding: str) -> Config:
    pp, vpp, dp, ep = shape
    return configuration(
        dp,
        ep,
        "precision=bf16",
        f"data.sequence_length={LENGTH}",
        "model.num_hidden_layers=5",
        f"parallel.pp={pp}",
        f"parallel.vpp={vpp}",
        "parallel.schedule=k2",
        f"parallel.dense_sharding={sharding}",
        "parallel.bucket_elements=4000",
        "parallel.router_weights=before_down",
    )


def train(rank: int, world_size: int) -> list[dict[str, Any]]:
    """A step of each shape in a real world, with balanced routers."""
    del rank, world_size
    measured, world = [], None
    for shape, sharding in SHAPES:
        config = configured(shape, sharding)
        step = open_step(config, torch.bfloat16)
        balance(step.model)
        step.run(1, part_of(step.world), RATE)
        step.optimizer.buffers.gathered()
        world = step.world
        buckets = step.optimizer.buffers.buckets
        groups = (world.ep, world.pp, world.edp, world.dp, world.everyone)
        measured.append(
            {
                "sent": {group.kind: group.traffic.sent for group in groups},
                "calls": {group.kind: group.traffic.calls for group in groups},
                "parameters": sum(bucket.parameters.nbytes for bucket in buckets),
                "gradients": sum(bucket.gradients.nbytes for bucket in buckets),
                "optimizer": sum(
                    values.nbytes for s in step.optimizer.shards for _, values in s.named_state()
                ),
            }
        )
        world.close()
    return measured


@pytest.fixture(scope="module")
def real() -> list[list[dict[str, Any]]]:
    return run_ranks(4, train)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda n: str(SHAPES[n]))
def test_a_dry_rank_counts_what_a_real_one_sends(
    real: list[list[dict[str, Any]]], number: int
) -> None:
    """Catches a collective that a dry run leaves out, starts twice, or gives other shapes."""
    config = configured(*SHAPES[number])
    for rank in range(4):
        run = dry_run_rank(config, rank)
        counted = {key: getattr(run, key) for key in real[rank][number]}
        assert counted == real[rank][number]
