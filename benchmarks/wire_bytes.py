"""Bytes on the wire a step and rank, counted on the loopback interface, against the formula.

    python -m benchmarks.wire_bytes [--steps 3] [KEY=VALUE ...]

Four ranks with bf16 parameters train a model of 28 million parameters in a network namespace
of their own. A rank is expected to send

    gradients    4 N (d - 1)/d         fp32; d is edp for experts and dp for everything else
    parameters   2 N (d - 1)/d         bf16
    exchange     4 F/dp (dp - 1)/dp    F: elements of the dense matrices that lie in flat shards

in a step (design 4.5). Beside it stands what this package counts itself, by operation: the
tensors' bytes without packets' headers. Expert parallelism also brings tokens to experts; those
bytes depend on routing, the formula has none of them, and they are taken off as counted.
"""

import argparse
import statistics
from dataclasses import dataclass

import numpy as np

from benchmarks.loopback import bytes_of, enter_own_network
from benchmarks.ranks import run_ranks
from benchmarks.report_lines import print_header, spread
from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.buckets import Layout
from kimi_pretrain.parallel.world import World, open_world
from kimi_pretrain.train.step import TrainStep

RANKS, SEQUENCES, LENGTH, RATE = 4, 2, 64, 1e-3
TARGET = 0.05
MODEL = (
    "model=k2_mini",
    "model.num_hidden_layers=8",
    "model.first_k_dense_replace=4",
    "model.intermediate_size=2048",
    "model.n_routed_experts=16",
    f"schedule.global_batch_size={RANKS * SEQUENCES}",
    f"schedule.micro_batch_size={SEQUENCES}",
    "parallel.bucket_elements=4000000",
)


@dataclass(frozen=True)
class Expected:
    """The formula's bytes that a rank sends in a step."""

    gradients: float
    parameters: float
    exchange: float

    @property
    def total(self) -> float:
        return self.gradients + self.parameters + self.exchange


@dataclass(frozen=True)
class Counted:
    """One rank's view of the measured steps."""

    expected: Expected
    parameters: int  # elements that this rank holds
    padding: int  # elements that stand for no parameter
    lent: float  # bytes of expert matrices that Newton-Schulz takes elsewhere, there and back
    wire: list[int]  # [steps] bytes that all ranks sent, on the interface
    own: list[dict[str, int]]  # [steps] bytes that this rank sent, by group and operation


def expected(layout: Layout) -> Expected:
    """The formula for one rank of a stage."""
    travelling = sum(b.elements * (b.ranks - 1) / b.ranks for b in layout.buckets)
    flat = sum(b.elements for b in layout.buckets if b.kind == "flat")
    dp = layout.dp
    return Expected(4 * travelling, 2 * travelling, 4 * flat / dp * (dp - 1) / dp)


def lent_bytes(layout: Layout) -> float:
    """Bytes a rank, on average over dp, of whole matrices lent to another and back."""
    total = 0
    for bucket in layout.buckets:
        if bucket.kind == "aligned":
            for ep_index, owners in enumerate(bucket.owners):
                for matrix, owner in zip(bucket.matrices, owners, strict=True):
                    holder = matrix.offset // bucket.shard
                    if owner != bucket.dp_rank(holder, ep_index, layout.ep):
                        total += 2 * 2 * matrix.rows * matrix.cols
    return total / layout.dp


def random_batch(config: Config, rank: int, sequences: int, length: int) -> Batch:
    generator = np.random.default_rng(rank)
    windows = generator.integers(0, config.model.vocab_size, (sequences, length + 1))
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), None)


def sent_by(world: World) -> dict[str, int]:
    """Bytes that this rank has sent, by group and operation."""
    groups = (world.ep, world.edp, world.dp, world.everyone)
    return {f"{g.kind} {name}": size for g in groups for name, size in g.traffic.sent.items()}


def train_as_rank(overrides: tuple[str, ...], steps: int) -> Counted:
    config = compose(["precision=bf16", "run_dir=unused", *MODEL, *overrides])
    world = open_world(config.parallel)
    step = TrainStep.open(config, resolve(config.precision), world)
    batch = random_batch(config, world.rank, SEQUENCES, LENGTH)

    def run() -> None:
        step.run(1, batch, RATE)
        step.optimizer.buffers.gathered()

    run()
    wire, own = [], []
    for _ in range(steps):
        before: dict[str, int] = {}

        def counted(before: dict[str, int] = before) -> None:
            before.update(sent_by(world))
            run()
            own.append({name: n - before.get(name, 0) for name, n in sent_by(world).items()})

        wire.append(bytes_of(counted, world.everyone.barrier))
    layout = step.optimizer.buffers.layout
    held = sum(p.numel() for _, p in step.model.named_parameters())
    lent = lent_bytes(layout)
    world.close()
    padding = sum(bucket.padding for bucket in layout.buckets)
    return Counted(expected(layout), held, padding, lent, wire, own)


def measure(title: str, steps: int, *overrides: str) -> float:
    """Print one layout's bytes; how far the wire is from the formula, as a share of it."""
    ranks: list[Counted] = run_ranks(
        RANKS, train_as_rank, (f"parallel.dp={RANKS}", *overrides), steps
    )
    formula = ranks[0].expected
    names = sorted({name for rank in ranks for own in rank.own for name in own})
    mean = {
        name: statistics.mean(own.get(name, 0) for rank in ranks for own in rank.own)
        for name in names
    }
    tokens = sum(size for name, size in mean.items() if name.startswith("ep "))
    counted = sum(mean.values()) - tokens
    wire = [size / RANKS - tokens for size in ranks[0].wire]
    ratio = statistics.median(wire) / formula.total
    print(
        f"{title}: {ranks[0].parameters / 1e6:.1f} M parameters a rank, {ranks[0].padding} of "
        "padding; MB a step and rank"
    )
    print(
        f"  formula            {formula.total / 1e6:.3f} (gradients {formula.gradients / 1e6:.3f}, "
        f"parameters {formula.parameters / 1e6:.3f}, exchange {formula.exchange / 1e6:.3f})"
    )
    print(f"  on the wire        {spread([size / 1e6 for size in wire])}")
    print(f"  counted by Group   {counted / 1e6:.3f}")
    for name, size in mean.items():
        print(f"    {name:22s} {size / 1e6:.3f}" + (" (taken off)" if name[:3] == "ep " else ""))
    lent = statistics.mean(rank.lent for rank in ranks)
    print(f"  lent experts       {lent / 1e6:.3f} of the all-to-all, not in the formula")
    print(f"  wire / formula     {ratio:.4f}")
    print(f"  wire / counted     {statistics.median(wire) / counted:.4f}", flush=True)
    return abs(ratio - 1)


def main() -> None:
    enter_own_network()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as KEY=VALUE")
    arguments = parser.parse_args()
    more = arguments.overrides
    print_header(f"bytes on the wire, {RANKS} ranks of one thread", ["torch"])
    apart = [
        measure(
            f"dp {RANKS}, ep {ep}, dense matrices {sharding}",
            arguments.steps,
            f"parallel.ep={ep}",
            f"parallel.dense_sharding={sharding}",
            *more,
        )
        for ep, sharding in [(1, "flat"), (1, "aligned"), (2, "flat")]
    ]
    verdict = "reached" if max(apart) <= TARGET else "missed"
    print(f"largest distance {max(apart):.2%}, target {TARGET:.0%}: {verdict}")


if __name__ == "__main__":
    main()
