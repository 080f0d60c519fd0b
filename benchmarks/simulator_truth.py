"""Simulated against measured step time of twelve pipelines.

    python -m benchmarks.simulator_truth [--milliseconds 15] [--rounds 3]

Two and four ranks over gloo whose layers sleep: a forward that long, an input gradient a third
longer, a weight gradient a third shorter. What a message of 256 KiB takes is measured between two
ranks before; nothing else is fitted. The executor runs the very schedule that is simulated.
"""

import argparse
import statistics
import time

from benchmarks.ranks import run_ranks
from benchmarks.report_lines import print_header, spread
from benchmarks.sleeping import (
    Seconds,
    Shape,
    Sleeper,
    message_seconds,
    print_priority,
    wake_on_time,
)
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.pipeline import simulate
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import generate

SHAPE = Shape(tokens=256, hidden=256)
Case = tuple[str, int, int, int, int]  # schedule, pp, vpp, microbatches, layers a stage
CASES: tuple[Case, ...] = (
    ("gpipe", 2, 1, 8, 1),
    ("1f1b", 2, 1, 8, 2),
    ("interleaved_1f1b", 2, 2, 8, 1),
    ("k2", 2, 1, 8, 2),
    ("k2", 2, 4, 4, 1),
    ("gpipe", 4, 1, 8, 1),
    ("1f1b", 4, 1, 8, 1),
    ("interleaved_1f1b", 4, 2, 8, 1),
    ("interleaved_1f1b", 4, 2, 10, 1),
    ("zb_h1", 4, 1, 12, 1),
    ("k2", 4, 2, 8, 1),
    ("k2", 4, 4, 8, 1),
)
TARGET = 0.05


def schedule_of(case: Case) -> Schedule:
    name, pp, vpp, microbatches, _ = case
    return insert_p2p(generate(name, pp, vpp, microbatches))


def run_as_rank(
    cases: list[Case], seconds: Seconds, rounds: int
) -> tuple[float, dict[Case, list[float]]]:
    """Seconds of a message and of this rank's steps; the cases take turns in every round."""
    wake_on_time()
    world = open_world(ParallelConfig(pp=cases[0][1], timeout_seconds=120.0))
    message = message_seconds(world.pp, SHAPE)
    sides = {
        case: Sleeper.of(schedule_of(case), world.pp, LocalDispatcher(), SHAPE, seconds, case[-1])
        for case in cases
    }
    found: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in sides if number % 2 else reversed(sides):
            world.everyone.barrier()
            started = time.perf_counter()
            sides[case].step()
            found[case].append(time.perf_counter() - started)
    world.close()
    return message, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--milliseconds", type=float, default=15.0, help="of a layer's forward")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    one = arguments.milliseconds / 1e3
    seconds = Seconds((one, one * 4 / 3, one * 2 / 3))
    print_header("simulated against measured step time, ranks of sleep over gloo", ["torch"])
    print_priority()
    errors = []
    for pp in sorted({case[1] for case in CASES}):
        cases = [case for case in CASES if case[1] == pp]
        ranks = run_ranks(pp, run_as_rank, cases, seconds, arguments.rounds)
        message = ranks[0][0]
        print(f"{pp} ranks: a message takes {1e3 * message:.2f} ms")
        for case in cases:
            schedule = schedule_of(case)
            costs = seconds.costs((case[-1],) * schedule.stages, p2p=message)
            simulated = simulate(schedule, costs).seconds
            steps = [max(each) for each in zip(*(found[case] for _, found in ranks), strict=True)]
            errors.append(simulated / statistics.median(steps) - 1)
            name, _, vpp, microbatches, layers = case
            print(
                f"  {name:17s} vpp {vpp}, {microbatches:2d} microbatches, {layers} layers a stage: "
                f"simulated {1e3 * simulated:6.1f} ms, measured "
                f"{spread([1e3 * step for step in steps])}, error {errors[-1]:+.2%}",
                flush=True,
            )
    mean = statistics.mean(abs(error) for error in errors)
    verdict = "reached" if mean < TARGET else "missed"
    print(
        f"mean error {mean:.2%} (largest {max(map(abs, errors)):.2%}), target under "
        f"{TARGET:.0%}: {verdict}"
    )


if __name__ == "__main__":
    main()
