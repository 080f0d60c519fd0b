"""How much of the expert all-to-all is hidden under computing, on links of a fixed rate.

    python -m benchmarks.hidden_communication [--milliseconds 25] [--megabits 200] [--rounds 3]

Four ranks in network namespaces, each on a link shaped to that rate both ways (root, or a
container that may). Attention and experts sleep that long each, forward, input gradient and weight
gradient; rows to and from experts and activations between stages travel for real. Three schedules
run in turn:

    no overlap          interleaved 1F1B with B as I and W: all wait for every all-to-all
    interleaved_1f1b    weight gradients are computed while rows of the same backward fly
    k2                  pairs: the all-to-all of one microbatch under the computing of another

Exposed is an all-to-all under which its rank computes nothing; the share is of the time that the
same all-to-alls take with no overlap. Beside the whole step stands the part outside warm-up and
cool-down: what K2's schedule has in pairs. What K2 saves is compared with what the simulator says
it does, given the measured seconds of one all-to-all and of one message.
"""

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.ranks import run_ranks
from benchmarks.report_lines import print_header, spread
from benchmarks.shaped_network import enter_shaped_network, join_network
from benchmarks.sleeping import (
    Seconds,
    Shape,
    Sleeper,
    message_seconds,
    print_priority,
    wake_on_time,
)
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.dispatch import AllToAllDispatcher
from kimi_pretrain.parallel.rendezvous import Place
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.pipeline import simulate
from kimi_pretrain.pipeline.actions import Overlap, Schedule, leaves
from kimi_pretrain.pipeline.passes import insert_p2p, split_weight_grad
from kimi_pretrain.pipeline.schedules import interleaved_1f1b, k2
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COMPUTE, Span, merged, without

RANKS, MICROBATCHES = 4, 8
PLAIN, WITH_W, K2 = "no overlap", "interleaved_1f1b", "k2"
HIDDEN_TARGET, SAVED_TARGET = 0.9, 0.1


class Layout(NamedTuple):
    pp: int
    vpp: int
    ep: int
    shape: Shape  # about as many bytes leave a rank in both


LAYOUTS = (
    Layout(2, 2, 2, Shape(tokens=64, hidden=256, choices=8)),
    Layout(1, 1, 4, Shape(tokens=42, hidden=256, choices=8)),
)


@dataclass
class Seen:
    """One rank's view of one step."""

    seconds: float
    flights: list[float]  # seconds of every all-to-all, from its start until it was awaited
    exposed: float
    exposed_in_pairs: float  # of what K2 has in pairs


@dataclass
class Measured:
    message: float
    steps: dict[str, list[Seen]]


def schedules(layout: Layout) -> dict[str, Schedule]:
    plain = interleaved_1f1b(layout.pp, layout.vpp, MICROBATCHES)
    paired = k2(layout.pp, layout.vpp, MICROBATCHES)
    orders = {PLAIN: split_weight_grad(plain), WITH_W: plain, K2: paired}
    return {name: insert_p2p(order) for name, order in orders.items()}


def paired_actions(schedule: Schedule, rank: int) -> set[str]:
    """What the rank's pairs consist of; a backward is named as I."""
    return {
        str(action) for n in schedule.ranks[rank] if isinstance(n, Overlap) for action in leaves(n)
    }


def run_as_rank(layout: Layout, seconds: Seconds, rounds: int) -> Measured:
    wake_on_time()
    join_network(Place.of_environment().rank)
    sizes = ParallelConfig(pp=layout.pp, ep=layout.ep, dp=layout.ep, timeout_seconds=120.0)
    world = open_world(sizes)
    dispatcher = AllToAllDispatcher(world.ep)
    experts = 4 * layout.ep
    sides = {
        name: Sleeper.of(schedule, world.pp, dispatcher, layout.shape, seconds, 1, experts)
        for name, schedule in schedules(layout).items()
    }
    paired = paired_actions(schedules(layout)[K2], world.pp.index)
    message = 0.0 if layout.pp == 1 else message_seconds(world.pp, layout.shape)
    nothing = Seconds((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    order = schedules(layout)[PLAIN]
    Sleeper.of(order, world.pp, dispatcher, layout.shape, nothing, 1, experts).step()
    steps: dict[str, list[Seen]] = defaultdict(list)
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            world.everyone.barrier()
            steps[name].append(_watched(sides[name], paired))
    world.close()
    return Measured(message, dict(steps))


def _watched(side: Sleeper, paired: set[str]) -> Seen:
    computed: list[Span] = []
    flown: list[tuple[str, Span]] = []

    def observe(node: str, resource: str, name: str, start: float, end: float) -> None:
        if resource == COMPUTE:
            computed.append((start, end))
        elif resource == ALL_TO_ALL:
            flown.append((name.split()[0].replace("B", "I"), (start, end)))

    side.executor.observe = observe
    started = time.perf_counter()
    side.step()
    took = time.perf_counter() - started
    busy = merged(computed)

    def exposed(spans: list[Span]) -> float:
        return sum(end - start for start, end in without(merged(spans), busy))

    return Seen(
        took,
        [end - start for _, (start, end) in flown],
        exposed([span for _, span in flown]),
        exposed([span for action, span in flown if action in paired]),
    )


def report(layout: Layout, seconds: Seconds, megabits: float, ranks: list[Measured]) -> bool:
    """Print one layout's figures; whether it reached the targets."""
    alone = statistics.median(f for r in ranks for seen in r.steps[PLAIN] for f in seen.flights)
    message = max(rank.message for rank in ranks)
    orders = schedules(layout)
    each = 4 * layout.vpp * MICROBATCHES  # all-to-alls of a rank
    share_paired = statistics.mean(
        len(paired_actions(orders[K2], index)) / (2 * layout.vpp * MICROBATCHES)
        for index in range(layout.pp)
    )
    rows = layout.shape.tokens * layout.shape.choices * (layout.ep - 1) // layout.ep
    size = rows * layout.shape.hidden * 4
    print(
        f"pp {layout.pp}, vpp {layout.vpp}, ep {layout.ep}, {MICROBATCHES} microbatches: an "
        f"all-to-all sends {size / 1024:.0f} KiB a rank in {1e3 * alone:.1f} ms "
        f"({8e3 * size / megabits / 1e6:.1f} at the links' rate), a message takes "
        f"{1e3 * message:.1f} ms; {share_paired:.0%} of all are in K2's pairs"
    )
    steps, in_pairs, predicted = {}, {}, {}
    costs = seconds.costs((1,) * orders[K2].stages, alone, message)
    for name, order in orders.items():
        took = [
            max(r.steps[name][i].seconds for r in ranks) for i in range(len(ranks[0].steps[name]))
        ]
        count = len(took)
        whole = [
            statistics.mean(r.steps[name][i].exposed for r in ranks) / (each * alone)
            for i in range(count)
        ]
        pairs = [
            statistics.mean(r.steps[name][i].exposed_in_pairs for r in ranks)
            / (each * share_paired * alone)
            for i in range(count)
        ]
        predicted[name] = simulate(order, costs).seconds
        steps[name], in_pairs[name] = statistics.median(took), statistics.median(pairs)
        print(
            f"  {name:17s} step {spread([1e3 * t for t in took])} ms, simulated "
            f"{1e3 * predicted[name]:.4g}; exposed: of the step {spread(whole)}, outside warm-up "
            f"and cool-down {spread(pairs)}"
        )
    saved, expected = steps[PLAIN] - steps[K2], predicted[PLAIN] - predicted[K2]
    print(
        f"  k2 is {steps[PLAIN] / steps[K2]:.3f} times as fast as no overlap, "
        f"{steps[WITH_W] / steps[K2]:.3f} times as interleaved_1f1b; saves {1e3 * saved:.0f} ms, "
        f"simulated {1e3 * expected:.0f}: ratio {saved / expected:.3f}"
    )
    hidden = 1 - in_pairs[K2]
    reached = hidden >= HIDDEN_TARGET, abs(saved / expected - 1) <= SAVED_TARGET
    words = ["reached" if each else "missed" for each in reached]
    print(
        f"  hidden outside warm-up and cool-down {hidden:.1%}, target {HIDDEN_TARGET:.0%}: "
        f"{words[0]}; saved within {SAVED_TARGET:.0%} of simulated: {words[1]}",
        flush=True,
    )
    return all(reached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--milliseconds", type=float, default=25.0, help="of each phase")
    parser.add_argument("--megabits", type=float, default=200.0, help="a second, of every link")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    enter_shaped_network(RANKS, arguments.megabits)
    one = arguments.milliseconds / 1e3
    seconds = Seconds((one, one, one), (one, one, one))
    title = f"hidden communication, {RANKS} ranks on links of {arguments.megabits:g} Mbit/s"
    print_header(title, ["torch"])
    print_priority()
    for layout in LAYOUTS:
        ranks = run_ranks(RANKS, run_as_rank, layout, seconds, arguments.rounds)
        report(layout, seconds, arguments.megabits, ranks)


if __name__ == "__main__":
    main()
