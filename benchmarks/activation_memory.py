"""One MoE layer of K2's shape with everything kept against `activation=k2`: memory and time.

    python -m benchmarks.activation_memory [--dial 8] [--length 2048] [--microbatches 16]
                                           [--rounds 5]

The layer of a pipeline's first stage: as many forwards as microbatches are in flight, on K2's 16
stages 16, then their backwards. Widths are K2's, scaled by the dial (model=k2_family); 24 experts
of which a token takes 8, as on a rank of 16-way expert parallelism; router weights act before the
down-projection; bf16.

Memory is counted, not estimated: every storage that an operation of the step makes, kept or
passing, until it is freed, counts while it lives; the host's slab does not, as on a GPU. What is
counted is the same on every run. Beside it stands what the process itself took: by how much the
forwards and backwards of a step raise the resident peak of a fresh process (every tensor in pages
of its own), over what `plan` says of the same row of actions, gradients that wait for W included.
There a CPU's slab is memory as any other, on both sides. What an operation needs only while it
runs is in no plan, so that the ratio is above 1, the more the fewer microbatches there are.

Time is measured apart, without the counting, the two sides alternating in one process; copies run
in a thread beside the compute.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report_lines import print_header, spread
from kimi_pretrain.activation.offload import Offloader
from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.config import compose
from kimi_pretrain.config.activation import PRESETS, offloads, policies
from kimi_pretrain.config.schema import ActivationConfig, Config
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.hand_out import hand_out
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.tape import ChunkTape, backward_steps, forward_steps, straight
from kimi_pretrain.ops import registry
from kimi_pretrain.ops.main_grad import Deferral, Product
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.plan.activations import Setting, stage_kept
from kimi_pretrain.plan.in_flight import held_along

CPU = torch.device("cpu")
LAYERS = range(1, 2)  # a MoE layer, neither the first nor the last


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        for x in tree_leaves(result):
            if _is_tensor(x) and (storage := x.untyped_storage())._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: seen for key, seen in self._live.items() if not seen[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


class Stage:
    """A chunk of one MoE layer with main gradients, and inputs for some microbatches."""

    def __init__(self, config: Config, microbatches: int) -> None:
        model, length = config.model, config.data.sequence_length
        torch.manual_seed(0)
        self.chunk = Chunk(model, LAYERS, torch.bfloat16)
        self.deferral = Deferral()
        for parameter in self.chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
            parameter.main_grad_deferral = self.deferral  # type: ignore[attr-defined]
        kernels = registry.kernels_for("auto", "cpu", torch.bfloat16)  # as in a run
        hand_out(self.chunk, kernels)
        self.shared = Microbatch.build(model, length, torch.bfloat16, CPU)
        self.dispatcher = LocalDispatcher(weights_at_experts=True, kernels=kernels)
        self.microbatches = microbatches
        self.x = torch.randn(1, length, model.hidden_size, dtype=torch.bfloat16)

    def step(self, activations: Activations) -> None:
        """All forwards, then all backwards, the last first."""
        engine, tapes = activations.offloader, list[ChunkTape]()
        for _ in range(self.microbatches):
            mark = 0 if engine is None else engine.mark()
            self.forward(activations, tapes)
            if engine is not None:
                engine.settle(mark)
                # The last two would have to come back at once, as `insert_offload` knows.
                if len(tapes) <= self.microbatches - 2:
                    engine.leave(tapes[-1].saved.offloadable())
        while tapes:
            if engine is not None and len(tapes) > 1:
                engine.fetch(tapes[-2].saved.offloadable())
            self.backward(tapes.pop())

    def backward(self, tape: ChunkTape) -> None:
        """Weight gradients wait until rows would fly, as in a schedule's whole backward."""
        waiting: list[Product] = []
        self.deferral.into = waiting
        for stop in backward_steps(tape, self.x, self.dispatcher):
            if stop.flight is not None:
                _compute(waiting)
        self.deferral.into = None
        _compute(waiting)

    def forward(self, activations: Activations, tapes: list[ChunkTape]) -> None:
        keep, x = tapes.append, self.x.clone()  # as it arrives from the stage before
        straight(
            forward_steps(
                self.chunk, x, self.shared, self.dispatcher, keep, activations=activations
            )
        )


def opened(activation: ActivationConfig, host_bytes: int) -> Activations:
    """As a run opens them, with the kernels of csrc/ where they were built."""
    quantise = registry.select("quantise_tiles", "auto", "cpu", torch.bfloat16)
    dequantise = registry.select("dequantise_tiles", "auto", "cpu", torch.bfloat16)
    engine = Offloader(CPU, host_bytes) if offloads(activation) else None
    return Activations(policies(activation), engine, quantise, dequantise)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that lived at once during a step."""
    with LiveBytes() as live:
        step()
    return live.peak


@torch.no_grad()
def _compute(waiting: list[Product]) -> None:
    for product in waiting:
        product.add()
    waiting.clear()


def process_growth(config: Config, microbatches: int) -> int:
    """Bytes by which a step raises the resident peak of a process of its own."""
    # Read when a process starts: memory that is freed goes back at once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_growth, (config, microbatches))


def _growth(config: Config, microbatches: int) -> int:
    torch.set_num_threads(1)
    stage = Stage(config, 1)
    stage.step(opened(config.activation, 2**28))  # what libraries take for themselves
    slab = 2 * microbatches * stage_kept(Setting.of(config, 1), LAYERS).host
    activations = opened(config.activation, int(slab))  # what is not written takes no memory
    stage.microbatches = microbatches
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    stage.step(activations)
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Bytes of this process that are in memory, or were at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def planned(config: Config, microbatches: int) -> tuple[float, float]:
    """The most that the plan says of ``Stage.step``: on the device, and with the slab."""
    setting = Setting.of(config, 1)
    kept = stage_kept(setting, LAYERS)
    leaves = [number for number in range(microbatches - 2) if kept.host]
    row = []
    for number in range(microbatches):
        row += [f"0F{number}", *[f"0OFFLOAD{number}"] * (number in leaves)]
    for number in reversed(range(microbatches)):
        row += [*[f"0PREFETCH{number - 1}"] * (number - 1 in leaves), f"0B{number}"]
    device = most = slab = 0.0
    for held in held_along(Schedule.from_text([",".join(row)]), 0, [kept]):
        slab = max(slab, held.host)  # pages once written stay
        device = max(device, held.device + held.gradients)
        most = max(most, held.device + held.gradients + slab)
    return device, most


def _hidden(dial: int) -> int:
    return compose(["model=k2_family", f"model.dial={dial}"]).model.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dial", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the other core is the copies'
    print_header("activation memory of one K2 layer", ["torch"])
    print(f"kernels: {registry.summary('auto', 'cpu', torch.bfloat16)}")
    config = compose(
        [
            "model=k2_family",
            f"model.dial={arguments.dial}",
            "model.n_routed_experts=24",
            "model.num_experts_per_tok=8",
            # K2's 2,048 of 7,168; the family's small members have wider experts.
            f"model.moe_intermediate_size={_hidden(arguments.dial) * 2 // 7}",
            "parallel.router_weights=before_down",
            f"data.sequence_length={arguments.length}",
            f"model.max_position_embeddings={max(4096, arguments.length)}",
        ]
    )
    stage = Stage(config, arguments.microbatches)
    sides = {name: opened(ActivationConfig(name), 2**32) for name in ("none", "k2")}
    model = config.model
    print(
        f"layer: hidden {model.hidden_size}, {model.num_attention_heads} heads, experts of "
        f"{model.moe_intermediate_size}; {arguments.length} tokens, {arguments.microbatches} "
        "microbatches in flight"
    )
    peaks = {}
    for name, activations in sides.items():
        stage.step(activations)  # warm
        peaks[name] = peak_bytes(lambda chosen=activations: stage.step(chosen))
        chosen = replace(config, activation=ActivationConfig(name))
        says, _ = planned(chosen, arguments.microbatches)
        print(
            f"{name:5} peak {peaks[name] / 2**20:8.1f} MiB on the device, the plan says "
            f"{says / 2**20:8.1f}: {peaks[name] / says:.3f}"
        )
    here = {
        tag: text.replace("+offload", "").replace("offload", "keep")
        for tag, text in PRESETS["k2"].items()
    }
    for name, policy in {
        "none": ActivationConfig(),
        "k2 without offload": ActivationConfig("custom", here),
        "k2": ActivationConfig("k2"),
    }.items():
        chosen = replace(config, activation=policy)
        grows = process_growth(chosen, arguments.microbatches)
        _, says = planned(chosen, arguments.microbatches)
        print(
            f"{name:18} a step takes {grows / 2**20:8.1f} MiB of the process, the plan says "
            f"{says / 2**20:8.1f}: {grows / says:.3f}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            started = time.perf_counter()
            stage.step(sides[name])
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:5} step {spread(times)} s")
    cost = [ours / plain - 1 for plain, ours in zip(seconds["none"], seconds["k2"], strict=True)]
    print(f"memory: {peaks['none'] / peaks['k2']:.2f} times smaller (held to 4)")
    print(f"time:   {100 * statistics.median(cost):+.1f} % (held to 15)")


if __name__ == "__main__":
    main()
