"""Python time of the executor an action, against torch.distributed.pipelining's runtime.

    python -m benchmarks.executor_overhead [--rounds 15]

Chunks of one layer that computes nothing: what is left is the executor, the generators, and the
autograd graph of one phase. An action is a forward, a backward or a weight gradient; sends and
receives are on the account of the action they belong to. Against torch one process holds four
stages and nothing is sent (a peer can be measured that way); then one rank of two, whose messages
arrive at once, with ``interleaved_1f1b`` and with ``k2``, whose pairs alternate two microbatches.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.pipeline_bubble import torch_step
from benchmarks.report_lines import print_header, spread
from benchmarks.sleeping import Seconds, Shape, Sleeper
from kimi_pretrain.parallel.collectives import Group, Handle
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.pipeline.actions import COMPUTE, Schedule, leaves
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import generate

SHAPE, NOTHING = Shape(tokens=4, hidden=8), Seconds((0.0, 0.0, 0.0))
STAGES, MICROBATCHES = 4, 16
TARGET = 150e-6


class Instant(Group):
    """A group of two whose messages take no time and carry nothing."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__("pp", (0, 1), 0, process_group="none")

    def send(self, tensor: Tensor, to: int) -> Handle:
        return Handle()

    def receive(self, tensor: Tensor, source: int) -> Handle:
        tensor.zero_()
        return Handle()


@dataclass
class Side:
    """Something that is timed: a step of so many actions."""

    step: Callable[[], Any]
    actions: int


def our_side(name: str, group: Group, vpp: int) -> Side:
    schedule = insert_p2p(generate(name, group.size, vpp, MICROBATCHES))
    sleeper = Sleeper.of(schedule, group, LocalDispatcher(), SHAPE, NOTHING)
    return Side(sleeper.step, actions_of(schedule, group.index))


def actions_of(schedule: Schedule, rank: int) -> int:
    return sum(a.kind in COMPUTE for node in schedule.ranks[rank] for a in leaves(node))


def torch_side() -> Side:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = Group("pp", (0,), 0, dist.group.WORLD)
    step = torch_step(group, STAGES, MICROBATCHES, NOTHING, SHAPE)
    return Side(step, 2 * STAGES * MICROBATCHES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_header("executor overhead, chunks that compute nothing", ["torch"])
    ours, peer = "ours, one process", "torch, one process"
    sides = {
        ours: our_side("interleaved_1f1b", Group("pp"), STAGES),
        peer: torch_side(),
        "ours, rank 0 of 2, interleaved_1f1b": our_side("interleaved_1f1b", Instant(), 2),
        "ours, rank 0 of 2, k2": our_side("k2", Instant(), 2),
    }
    for side in sides.values():
        side.step()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            started = time.perf_counter()
            sides[name].step()
            found[name].append((time.perf_counter() - started) / sides[name].actions)
    for name, seconds in found.items():
        print(f"{name:38s} {spread([1e6 * each for each in seconds])} us an action")
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(f"torch / ours {median[peer] / median[ours]:.2f}")
    worst = max(seconds for name, seconds in median.items() if name != peer)
    verdict = "reached" if worst <= TARGET else "missed"
    print(f"largest of ours {1e6 * worst:.1f} us, target under {1e6 * TARGET:.0f} us: {verdict}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
