"""Training tokens/s against transformers and torch.optim, same model, tokens and dtype.

    python -m benchmarks.training_throughput [--model k2_nano] [--steps 7]

Both sides run whole optimizer steps (forward, backward, update) on the same batches of the
default corpus, in turn, in one process. The peer is given the faster of its own expert
kernels (`eager` loops over experts, `grouped_mm` calls torch's grouped product), chosen by
a trial before the measurement.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.report_lines import paired_ratio, print_header, spread
from benchmarks.transformers_peer import PeerOptimizer, load_peer
from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch, TrainStream
from kimi_pretrain.data.corpus import ensure
from kimi_pretrain.model.build import from_config
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.step import TrainStep

Step = Callable[[Batch], None]


def our_step(config: Config) -> Step:
    step = TrainStep.open(config, resolve(config.precision), open_world(config.parallel))

    def run(batch: Batch) -> None:
        step.run(1, batch, config.optimizer.lr)

    return run


def peer_step(config: Config, experts: str) -> Step:
    dtype = resolve(config.precision)
    peer = load_peer(from_config(config.model, dtype=dtype), dtype, experts, "sdpa")
    optimizer = PeerOptimizer(peer, config.optimizer.lr)
    micro = config.schedule.micro_batch_size
    limit = config.optimizer.grad_clip

    def run(batch: Batch) -> None:
        for first in range(0, len(batch.tokens), micro):
            tokens = torch.from_numpy(batch.tokens[first : first + micro])
            labels = torch.from_numpy(batch.labels[first : first + micro])
            logits = peer(input_ids=tokens).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            (loss * micro / len(batch.tokens)).backward()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(peer.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()

    return run


def seconds(step: Step, batch: Batch) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def measure(precision: str, model: str, steps: int) -> None:
    config = compose(
        [f"model={model}", f"precision={precision}", "data.document_mask=false", "run_dir=unused"]
    )
    stream = TrainStream(ensure(config.data, print), config.data, config.seed)
    size = config.schedule.global_batch_size
    batches = [stream.read(i * size, size) for i in range(steps + 2)]

    trials = {name: peer_step(config, name) for name in ("eager", "grouped_mm")}
    for trial in trials.values():
        trial(batches[0])
    chosen = min(trials, key=lambda name: seconds(trials[name], batches[1]))
    ours, peer = our_step(config), trials[chosen]
    ours(batches[0])
    ours(batches[1])
    our_seconds: list[float] = []
    peer_seconds: list[float] = []
    turns = [(ours, our_seconds), (peer, peer_seconds)]
    for batch in batches[2:]:
        for step, taken in turns:
            taken.append(seconds(step, batch))
        turns.reverse()  # whoever went second goes first
    tokens = size * config.data.sequence_length
    ratio = paired_ratio(peer_seconds, our_seconds)
    print(
        f"{precision} {model} {tokens} tokens a step, microbatches of "
        f"{config.schedule.micro_batch_size} x {config.data.sequence_length}, no document mask"
    )
    print(f"  ours          {tokens / statistics.median(our_seconds):8.0f} tokens/s")
    print(f"  transformers  {tokens / statistics.median(peer_seconds):8.0f} tokens/s ({chosen})")
    print(f"  ratio         {spread(ratio)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="k2_nano")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    arguments = parser.parse_args()
    print_header("training tokens/s", ["torch", "transformers"])
    for precision in arguments.precision:
        measure(precision, arguments.model, arguments.steps)


if __name__ == "__main__":
    main()
