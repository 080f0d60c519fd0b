"""Step time of a pipeline over compute and ideal bubble, against torch.distributed.pipelining.

    python -m benchmarks.pipeline_bubble [--milliseconds 20] [--rounds 3]

Four ranks over gloo, 2 and 4 stages a rank, 8 and 16 microbatches. Every stage's forward, input
gradient and weight gradient sleeps that long; activations and gradients of 256 KiB travel for
real. Both sides run the same modules in the same process group, in turn: this package's executor
with ``interleaved_1f1b`` and ``k2``, torch's ScheduleInterleaved1F1B. The ideal is the same for
all: V M (F + I + W) of compute and a bubble of (P - 1) (F + I + W), interleaved 1F1B's. K2's own
is smaller, and its ratio can fall below one; beside it stands the ratio to its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

from benchmarks.ranks import run_ranks
from benchmarks.report_lines import print_header, spread
from benchmarks.sleeping import Seconds, Shape, Sleeper, SleepingChunk, print_priority, wake_on_time
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.pipeline import simulate
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import generate

RANKS = 4
SHAPE = Shape(tokens=256, hidden=256)
CASES = [(vpp, microbatches) for vpp in (2, 4) for microbatches in (8, 16)]
OURS = ("interleaved_1f1b", "k2")
TORCH = "torch Interleaved1F1B"
TARGET = 1.04


class Straight(nn.Module):
    """A chunk under one autograd graph, which is what torch's stages wrap."""

    def __init__(self, chunk: SleepingChunk) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, x: Tensor) -> Tensor:
        backbone: Any = self.chunk.model
        if hasattr(backbone, "embed_tokens"):
            x = backbone.embed_tokens(x)
        for layer in backbone.layers.values():
            attended = layer.attend(x, None, None)
            x = layer.dense(attended.residual, attended.hidden)
        return x


def torch_step(
    group: Group, vpp: int, microbatches: int, seconds: Seconds, shape: Shape = SHAPE
) -> Callable[[], Any]:
    """A step of torch's schedule on this rank; shapes are given, it infers none."""
    stages = group.size * vpp
    tokens = torch.zeros(1, shape.tokens, dtype=torch.int64)
    hidden = torch.zeros(1, shape.tokens, shape.hidden, requires_grad=True)
    mine: list[Any] = [
        PipelineStage(
            Straight(SleepingChunk(range(stage, stage + 1), stages, shape, seconds)),
            stage,
            stages,
            torch.device("cpu"),
            input_args=(tokens if stage == 0 else hidden,),
            output_args=(hidden,),
            group=group.process_group,
        )
        for stage in range(group.index, stages, group.size)
    ]
    schedule = ScheduleInterleaved1F1B(
        mine, microbatches, lambda output, target: output.mean(), scale_grads=False
    )
    batch = tokens.repeat(microbatches, 1)
    inputs: Any = (batch,) if group.index == 0 else ()
    target: Any = {"target": batch} if group.index == group.size - 1 else {}
    return lambda: schedule.step(*inputs, **target)


def time_as_rank(seconds: Seconds, rounds: int) -> dict[tuple[str, int, int], list[float]]:
    """Seconds of this rank's steps, by side and case; all take turns in every round."""
    wake_on_time()
    world = open_world(ParallelConfig(pp=RANKS, timeout_seconds=120.0))
    steps: dict[tuple[str, int, int], Callable[[], Any]] = {}
    for case in CASES:
        for name in OURS:
            steps[name, *case] = sleeper(name, world.pp, *case, seconds)
        steps[TORCH, *case] = torch_step(world.pp, *case, seconds)
    sleeper(OURS[0], world.pp, *CASES[0], Seconds((0.0, 0.0, 0.0)))()  # opens connections
    found: dict[tuple[str, int, int], list[float]] = {side: [] for side in steps}
    for number in range(rounds):
        for side in steps if number % 2 else reversed(steps):
            world.everyone.barrier()
            started = time.perf_counter()
            steps[side]()
            found[side].append(time.perf_counter() - started)
    world.close()
    return found


def sleeper(
    name: str, group: Group, vpp: int, microbatches: int, seconds: Seconds
) -> Callable[[], None]:
    schedule = schedule_of(name, vpp, microbatches)
    return Sleeper.of(schedule, group, LocalDispatcher(), SHAPE, seconds).step


def schedule_of(name: str, vpp: int, microbatches: int) -> Schedule:
    return insert_p2p(generate(name, RANKS, vpp, microbatches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of F, of I and of W")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    one = arguments.milliseconds / 1e3
    seconds = Seconds((one, one, one))
    print_header(f"pipeline bubble, {RANKS} ranks of sleep over gloo", ["torch"])
    print_priority()
    ranks = run_ranks(RANKS, time_as_rank, seconds, arguments.rounds)
    worst = 0.0
    for vpp, microbatches in CASES:
        ideal = (vpp * microbatches + RANKS - 1) * seconds.total
        print(f"{vpp} stages a rank, {microbatches} microbatches: ideal {ideal * 1e3:.1f} ms")
        median = {}
        for name in (*OURS, TORCH):
            steps = [
                max(each) for each in zip(*(r[name, vpp, microbatches] for r in ranks), strict=True)
            ]
            ratios = [step / ideal for step in steps]
            median[name] = statistics.median(ratios)
            own = ""
            if name == "k2":
                schedule = schedule_of(name, vpp, microbatches)
                least = simulate(schedule, seconds.costs((1,) * schedule.stages)).seconds
                own = f", over its own ideal {median[name] * ideal / least:.4f}"
            print(f"  {name:22s} step / ideal {spread(ratios)}{own}")
        print(f"  torch / ours           {median[TORCH] / median[OURS[0]]:.4f}", flush=True)
        worst = max(worst, median[OURS[0]])
    verdict = "reached" if worst <= TARGET else "missed"
    print(f"largest of ours {worst:.4f}, target at most {TARGET}: {verdict}")


if __name__ == "__main__":
    main()
