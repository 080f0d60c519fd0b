"""The optimizer step on four ranks against one rank, and its share of a training step.

    python -m benchmarks.sharded_optimizer [--rounds 9] [--steps 5] [KEY=VALUE ...]

The model is 8 layers of 32 experts x 3 matrices of 128x256 with their attention, embedding and
head: 30 million parameters, bf16, Newton-Schulz in bf16, one thread a rank.

1. Optimizer: global norm, clip, update of the shards and the parameters' all-gather, with dp=4
   and with dp=1 (one rank that holds everything), in turn, from the same weights and gradients.
   Four ranks on fewer cores wait for each other, so CPU seconds are counted: ``main thread``
   is the arithmetic, ``process`` adds the threads that carry bytes through sockets. During
   dp=1 all four processes do the same work each, so that both sides find the machine as busy.
2. A whole step at dp=4: what share of its CPU seconds is the optimizer and what share
   communication (socket threads, and sums of what arrived), and how long a rank waits.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.ranks import run_ranks
from benchmarks.report_lines import paired_ratio, print_header, spread
from benchmarks.wire_bytes import random_batch
from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.ops.main_grad import main_gradient
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.sharded import ShardedMuonClip
from kimi_pretrain.parallel.collectives import Group, Handle
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.parallel.world import World, open_world
from kimi_pretrain.train.step import TrainStep

RANKS, SEQUENCES, LENGTH, RATE = 4, 4, 128, 1e-3
TARGET = 2.5
SHARDED, WHOLE = f"dp {RANKS}", "dp 1"
MODEL = (
    "model=k2_mini",
    "model.vocab_size=2048",
    "model.num_hidden_layers=8",
    "model.first_k_dense_replace=0",
    "model.n_routed_experts=32",
    "model.moe_intermediate_size=128",
    f"schedule.global_batch_size={RANKS * SEQUENCES}",
    f"schedule.micro_batch_size={SEQUENCES}",
    "parallel.bucket_elements=4000000",
    f"parallel.dp={RANKS}",
)


@dataclass(frozen=True)
class Cost:
    """Seconds that one call took."""

    wall: float
    main: float  # CPU of the thread that computes
    process: float  # CPU of all threads


@dataclass(frozen=True)
class StepCost:
    """One training step of one rank, seconds."""

    whole: Cost
    optimizer: float  # CPU of the main thread, without waiting
    waiting_wall: float  # for operations to end
    waiting: float  # CPU of the main thread then: the sums of what arrived


def cost_of(call: Callable[[], object]) -> Cost:
    begun = time.perf_counter(), time.thread_time(), time.process_time()
    call()
    ended = time.perf_counter(), time.thread_time(), time.process_time()
    return Cost(*(end - begin for begin, end in zip(begun, ended, strict=True)))


class Stopwatch:
    """Wall and main-thread CPU seconds of all calls of wrapped functions."""

    def __init__(self, without: "Stopwatch | None" = None) -> None:
        self.wall = self.main = 0.0
        self.without = without  # time on this one is not counted

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            other = self.without or Stopwatch()
            wall, main = time.perf_counter() - other.wall, time.thread_time() - other.main
            result = function(*arguments)
            self.wall += time.perf_counter() - other.wall - wall
            self.main += time.thread_time() - other.main - main
            return result

        return timed

    def take(self) -> tuple[float, float]:
        """Wall and CPU seconds counted; begin again at zero."""
        taken = self.wall, self.main
        self.wall = self.main = 0.0
        return taken


def configuration(overrides: tuple[str, ...]) -> Config:
    return compose(["precision=bf16", "run_dir=unused", *MODEL, *overrides])


def alone(world: World) -> World:
    """A world of one rank, inside a process that is also a rank of ``world``."""
    return World(
        Topology(), 0, world.device, *(Group(k) for k in ("ep", "pp", "edp", "dp", "world"))
    )


def optimizer_of(config: Config, world: World) -> ShardedMuonClip:
    """An optimizer with random gradients, which are the same in every world."""
    step = TrainStep.open(config, resolve(config.precision), world)
    model, optimizer = step.model, step.optimizer
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        gradient = main_gradient(parameter)
        assert gradient is not None
        gradient.copy_(torch.randn(gradient.shape, generator=generator) * 1e-3)
    return optimizer


def weights_of(optimizer: ShardedMuonClip) -> dict[str, torch.Tensor]:
    """A copy of the parameters by name, fp32."""
    return {
        slot.spec.name: buffers.parameters[slot.offset : slot.stop].float()
        for buffers in optimizer.buffers.buckets
        for slot in buffers.bucket.slots
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """L2 norm of the difference."""
    squares = [float((one[name] - other[name]).square().sum()) for name in one]
    return math.sqrt(sum(squares))


@dataclass(frozen=True)
class Comparison:
    """The optimizer on one rank, by side."""

    costs: dict[str, list[Cost]]
    apart: float  # distance of the sides' weights, as a share of how far they moved


def compare_as_rank(overrides: tuple[str, ...], rounds: int) -> Comparison:
    config = configuration(overrides)
    world = open_world(config.parallel)
    sides = {SHARDED: optimizer_of(config, world), WHOLE: optimizer_of(config, alone(world))}
    start = weights_of(sides[WHOLE])
    costs: dict[str, list[Cost]] = {name: [] for name in sides}

    def update(optimizer: ShardedMuonClip) -> None:
        optimizer.clip_gradients(float(optimizer.norm()), config.optimizer.grad_clip)
        optimizer.step(RATE)
        optimizer.buffers.gathered()

    for number in range(-2, rounds):  # two rounds of warm-up
        for name in sorted(sides, reverse=bool(number % 2)):
            world.everyone.barrier()
            cost = cost_of(partial(update, sides[name]))
            if number >= 0:
                costs[name].append(cost)
    sharded, whole = weights_of(sides[SHARDED]), weights_of(sides[WHOLE])
    world.close()
    return Comparison(costs, distance(sharded, whole) / distance(whole, start))


def train_as_rank(overrides: tuple[str, ...], steps: int) -> list[StepCost]:
    """Costs of training steps on this rank."""
    config = configuration(overrides)
    world = open_world(config.parallel)
    step = TrainStep.open(config, resolve(config.precision), world)
    waiting = Stopwatch()
    optimizing = Stopwatch(without=waiting)
    Handle.wait = waiting.wrap(Handle.wait)  # type: ignore[method-assign]
    for name in ("norm", "clip_gradients", "step"):
        setattr(step.optimizer, name, optimizing.wrap(getattr(step.optimizer, name)))
    batch = random_batch(config, world.rank, SEQUENCES, LENGTH)

    def run() -> None:
        step.run(1, batch, RATE)
        step.optimizer.buffers.gathered()

    costs = []
    for number in range(-2, steps):
        world.everyone.barrier()
        waiting.take()  # the barrier's
        whole = cost_of(run)
        (_, optimizer), waited = optimizing.take(), waiting.take()
        if number >= 0:
            costs.append(StepCost(whole, optimizer, *waited))
    world.close()
    return costs


def of_busiest(ranks: list[Comparison], side: str, part: str) -> list[float]:
    """[rounds] seconds of the rank that took most, for which the others wait."""
    rounds = range(len(ranks[0].costs[side]))
    return [max(getattr(rank.costs[side][i], part) for rank in ranks) for i in rounds]


def compare(overrides: tuple[str, ...], rounds: int) -> float:
    """Print the optimizer's cost on both sides; the ratio of all its CPU seconds."""
    ranks: list[Comparison] = run_ranks(RANKS, compare_as_rank, overrides, rounds)
    print("optimizer step, CPU seconds of the busiest rank")
    ratio = 0.0
    for part, title in (("main", "main thread"), ("process", "process")):
        whole, sharded = (of_busiest(ranks, side, part) for side in (WHOLE, SHARDED))
        ratio = statistics.median(whole) / statistics.median(sharded)
        print(f"  {title}")
        print(f"    {WHOLE}     {spread(whole)} s")
        print(f"    {SHARDED}     {spread(sharded)} s")
        print(f"    ratio    {ratio:.2f}  pairs {spread(paired_ratio(whole, sharded))}")
    print(f"  weights differ by  {max(rank.apart for rank in ranks):.1e} of how far they moved")
    return ratio


def share(overrides: tuple[str, ...], steps: int) -> None:
    """Print what a training step at dp=4 spends where."""
    ranks: list[list[StepCost]] = run_ranks(RANKS, train_as_rank, overrides, steps)
    costs = [cost for rank in ranks for cost in rank]
    cpu = [cost.whole.process for cost in costs]
    rows = {
        "optimizer": [cost.optimizer / cost.whole.process for cost in costs],
        "socket threads": [1 - cost.whole.main / cost.whole.process for cost in costs],
        "sums of what arrived": [cost.waiting / cost.whole.process for cost in costs],
    }
    print(f"training step at dp {RANKS}, {SEQUENCES * LENGTH} tokens a rank, all ranks and steps")
    print(f"  CPU seconds a rank    {spread(cpu)}")
    for title, values in rows.items():
        print(f"    {title:20s}  {spread([100 * value for value in values])} %")
    wall = [cost.whole.wall for cost in costs]
    waiting = [100 * cost.waiting_wall / cost.whole.wall for cost in costs]
    print(f"  wall seconds          {spread(wall)}, {RANKS} ranks on {os.cpu_count()} cores")
    print(f"    waiting for others    {spread(waiting)} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as KEY=VALUE")
    arguments = parser.parse_args()
    overrides = tuple(arguments.overrides)
    print_header(f"sharded optimizer, {RANKS} ranks of one thread", ["torch"])
    ratio = compare(overrides, arguments.rounds)
    share(overrides, arguments.steps)
    verdict = "reached" if ratio >= TARGET else "missed"
    print(f"optimizer ratio {ratio:.2f}, target {TARGET}: {verdict}")


if __name__ == "__main__":
    main()
