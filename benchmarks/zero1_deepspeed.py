"""ZeRO-1 against DeepSpeed's: bytes on the wire and bytes of optimizer state, a step and rank.

    python -m benchmarks.zero1_deepspeed [--steps 3] [KEY=VALUE ...]

Two ranks train the same dense model of 23 million parameters (this package's, no experts) from
the same weights, on the same batches, with bf16 parameters and AdamW, over gloo on the CPU.
Bytes are counted on the loopback interface of a network namespace. DeepSpeed comes twice: as
it is configured by default, which sums gradients in bf16, and with fp32 gradients, which is
what this package always sums in. Ours comes with AdamW and with MuonClip.

State is what a rank keeps for the optimizer: fp32 masters and moments. The loss of the first
and the last step shows that all sides train the same model.
"""

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.loopback import bytes_of, enter_own_network
from benchmarks.ranks import run_ranks
from benchmarks.report_lines import print_header, spread
from benchmarks.wire_bytes import random_batch
from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.step import TrainStep

RANKS, SEQUENCES, LENGTH, RATE = 2, 2, 128, 1e-3
MODEL = (
    "model=k2_mini",
    "model.num_hidden_layers=8",
    "model.first_k_dense_replace=8",
    "model.intermediate_size=2048",
    f"schedule.global_batch_size={RANKS * SEQUENCES}",
    f"schedule.micro_batch_size={SEQUENCES}",
    "parallel.bucket_elements=4000000",
    f"parallel.dp={RANKS}",
)


@dataclass(frozen=True)
class Result:
    """One rank's view of a run."""

    wire: list[int]  # [steps] bytes that all ranks sent
    state: int  # bytes of masters and moments on this rank
    parameters: int  # elements of the whole model
    losses: list[float]  # [steps + 1], this rank's or the mean over ranks


def configuration(overrides: tuple[str, ...]) -> Config:
    return compose(["precision=bf16", "run_dir=unused", *MODEL, *overrides])


def our_rank(overrides: tuple[str, ...], steps: int) -> Result:
    config = configuration(overrides)
    world = open_world(config.parallel)
    step = TrainStep.open(config, resolve(config.precision), world)
    batch = random_batch(config, world.rank, SEQUENCES, LENGTH)
    losses = []

    def run() -> None:
        losses.append(step.run(1, batch, RATE).loss)
        step.optimizer.buffers.gathered()

    wire = counted(run, steps, world.everyone.barrier)
    state = sum(piece.values.nbytes for piece in step.optimizer.pieces())
    world.close()
    elements = sum(p.numel() for _, p in step.model.named_parameters())
    return Result(wire, state, elements, losses)


class WithLoss(nn.Module):
    """The plain model as a module that returns its loss, which is what DeepSpeed wraps."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(tokens, labels)


def deepspeed_rank(overrides: tuple[str, ...], steps: int, wide: bool) -> Result:
    config = configuration(overrides)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = WithLoss(from_config(config.model, resolve(config.precision)))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=deepspeed_settings(config, wide)
    )
    batch = random_batch(config, dist.get_rank(), SEQUENCES, LENGTH)
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    losses = []

    def run() -> None:
        loss = engine(tokens, labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())

    wire = counted(run, steps, dist.barrier)
    base = engine.optimizer.optimizer  # torch's AdamW over this rank's fp32 masters
    masters = [p for group in base.param_groups for p in group["params"]]
    moments = [t for kept in base.state.values() for t in kept.values() if t.ndim]
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    dist.destroy_process_group()
    elements = sum(p.numel() for p in model.parameters())
    state = sum(t.nbytes for t in [*masters, *moments])
    return Result(wire, state, elements, (mean / RANKS).tolist())


def import_deepspeed() -> Any:
    """DeepSpeed for the CPU, without compiling anything."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    import deepspeed
    import deepspeed.ops

    # It would build its shared-memory collectives for minutes, and they send nothing by wire.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def deepspeed_settings(config: Config, wide: bool) -> dict[str, Any]:
    adam = config.optimizer
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": adam.grad_clip or 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": RATE,
                "betas": list(adam.adam_betas),
                "eps": adam.adam_eps,
                "weight_decay": adam.weight_decay,
                "torch_adam": True,
            },
        },
    }
    if wide:
        settings |= {
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return settings


def counted(run: Callable[[], object], steps: int, barrier: Callable[[], object]) -> list[int]:
    """Bytes that all ranks send in each of ``steps`` steps, after one that is not counted."""
    run()
    return [bytes_of(run, barrier) for _ in range(steps)]


def main() -> None:
    enter_own_network()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as KEY=VALUE")
    arguments = parser.parse_args()
    print_header(f"ZeRO-1, {RANKS} ranks of one thread", ["torch", "deepspeed"])
    adamw = ("optimizer=adamw", *arguments.overrides)
    muon = ("optimizer=muonclip", *arguments.overrides)
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder  # a killed build leaves a lock that hangs
        runs: dict[str, list[Result]] = {
            "DeepSpeed AdamW, bf16 sums": run_ranks(RANKS, deepspeed_rank, adamw, steps, False),
            "DeepSpeed AdamW, fp32 sums": run_ranks(RANKS, deepspeed_rank, adamw, steps, True),
            "ours AdamW": run_ranks(RANKS, our_rank, adamw, steps),
            "ours MuonClip": run_ranks(RANKS, our_rank, muon, steps),
        }
    report(runs)


def report(runs: dict[str, list[Result]]) -> None:
    elements = next(iter(runs.values()))[0].parameters
    print(f"{elements / 1e6:.2f} M parameters, a step and rank; bytes a parameter in brackets")
    wires = {title: [size / RANKS for size in ranks[0].wire] for title, ranks in runs.items()}
    states = {title: max(rank.state for rank in ranks) for title, ranks in runs.items()}
    for title, ranks in runs.items():
        wire, losses = statistics.median(wires[title]), ranks[0].losses
        print(
            f"  {title:27s} wire {spread([w / 1e6 for w in wires[title]])} MB "
            f"({wire / elements:.3f}), state {states[title] / 1e6:.2f} MB "
            f"({states[title] / elements:.3f}), loss {losses[0]:.4f} to {losses[-1]:.4f}"
        )
    for ours in (title for title in runs if title.startswith("ours")):
        for peer in (title for title in runs if title.startswith("DeepSpeed")):
            wire = statistics.median(wires[ours]) / statistics.median(wires[peer])
            state = states[ours] / states[peer]
            print(f"  {ours} / {peer}: wire {wire:.3f}, state {state:.3f}")


if __name__ == "__main__":
    main()
