"""What it costs to measure where a step's time goes: steps with and without, in turn.

    python -m benchmarks.watching_cost [--pairs 60]

Two ranks with the experts spread over both train a small model in fp64; every wait for a
collective is timed in one step and in the next none is. Then the time of one timed wait that
waits for nothing, and of a comparison of ranks, which a run makes every 10 steps.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from benchmarks.ranks import run_ranks
from benchmarks.report_lines import print_header, spread
from kimi_pretrain.config import compose
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.comparison import Comparison
from kimi_pretrain.train.step import TrainStep

WARM_UP, EMPTY_WAITS, COMPARISONS = 2, 100_000, 20
SEQUENCES, LENGTH = 8, 32


def measure(pairs: int) -> dict[str, list[float]]:
    """As one rank: seconds by what was measured."""
    config = compose(
        [
            *("experiment=smoke", "precision=fp64", "run_dir=unused"),
            *("parallel.dp=2", "parallel.ep=2", "schedule.micro_batch_size=1"),
            f"schedule.global_batch_size={2 * SEQUENCES}",
        ]
    )
    world = open_world(config.parallel)
    step = TrainStep.open(config, torch.float64, world)
    windows = np.random.default_rng(world.rank).integers(0, 257, (SEQUENCES, LENGTH + 1))
    documents = np.zeros((SEQUENCES, LENGTH), np.int32)
    batch = Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), documents)
    groups = (world.ep, world.pp, world.edp, world.dp, world.everyone)
    found: dict[str, list[float]] = {"with": [], "without": [], "waits": [], "comparison": []}
    for number in range(2 * (pairs + WARM_UP)):
        timed = bool(number % 2)
        for group in groups:
            group.stopwatch = step.stopwatch if timed else None
        world.everyone.barrier()
        began = time.perf_counter()
        if timed:
            step.stopwatch.start("data")
        step.run(number + 1, batch, 1e-3)
        step.optimizer.buffers.gathered()
        waits = len(step.stopwatch._waits)
        if timed:
            step.stopwatch.stop()
        if number >= 2 * WARM_UP:
            found["with" if timed else "without"].append(time.perf_counter() - began)
            found["waits"] += [waits] if timed else []
    step.stopwatch.start("data")
    began = time.perf_counter()
    for _ in range(EMPTY_WAITS):
        with step.stopwatch.waiting("ep"):
            pass
    found["empty wait"] = [(time.perf_counter() - began) / EMPTY_WAITS]
    comparison = Comparison(world, None)
    for _ in range(COMPARISONS):
        world.everyone.barrier()
        began = time.perf_counter()
        comparison.row(1)
        found["comparison"].append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=60)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    print_header("cost of measuring where a step's time goes, 2 ranks", ["torch"])
    first, *_ = run_ranks(2, measure, pairs)
    ratios = [a / b for a, b in zip(first["with"], first["without"], strict=True)]
    print(f"step with    {spread(first['with'])} s")
    print(f"step without {spread(first['without'])} s")
    print(f"with / without, pair by pair: {spread(ratios)}")
    waits, empty = statistics.median(first["waits"]), first["empty wait"][0]
    share = waits * empty / statistics.median(first["without"])
    print(f"{waits:.0f} waits a step x {1e6 * empty:.2f} us = {100 * share:.2f} % of it")
    print(f"comparison of ranks, every 10 steps: {spread(first['comparison'])} s")


if __name__ == "__main__":
    main()
