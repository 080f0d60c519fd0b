"""One optimizer step on 768 expert matrices against torch.optim.Muon.

    python -m benchmarks.optimizer_step [--threads N] [--rounds 9]

8 layers x 32 experts x 3 matrices of 128x256, Newton-Schulz in bf16 and the same number of
threads on both sides. Both do the same work (momentum, five Newton-Schulz steps, decoupled
weight decay, update scaled by 0.2 sqrt(256)), in turn, in one process; the side that begins
changes each round. Three layouts:

    fp32          fp32 parameters and gradients, the same 768 two-dimensional parameters
    fp32 stacks   ours holds them as this package's model does, one stack a layer and side
    bf16 master   bf16 parameters, fp32 gradients and fp32 masters; torch.optim.Muon has no
                  masters, so it steps fp32 weights that are then copied into bf16 ones

After the measurement the weights of both sides are compared: they have taken as many steps
from the same start, and differ by the rounding of bf16 products only.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.report_lines import paired_ratio, print_header, spread
from kimi_pretrain.optim import MuonClip

LAYERS, EXPERTS, SIDES, ROWS, COLS = 8, 32, 3, 128, 256
LR, DECAY, MOMENTUM = 2e-4, 0.1, 0.95
TARGET = 2.0


@dataclass
class Side:
    """One optimizer over all matrices: how to step it, and its weights [matrices, rows, cols]."""

    step: Callable[[], object]
    weights: Callable[[], Tensor]


def matrices(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS * EXPERTS * SIDES, ROWS, COLS, generator=generator)


def with_grad(weight: Tensor, grad: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    return parameter


def torch_muon(bf16: bool) -> Side:
    parameters = [with_grad(w, g) for w, g in zip(matrices(0), matrices(1), strict=True)]
    optimizer = torch.optim.Muon(
        parameters,
        lr=LR,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    rounded = [p.detach().bfloat16() for p in parameters]

    def step() -> None:
        optimizer.step()
        if bf16:
            torch._foreach_copy_(rounded, [p.detach() for p in parameters])

    return Side(step, lambda: torch.stack([p.detach() for p in parameters]))


def ours(bf16: bool, stacked: bool) -> Side:
    weights, grads = matrices(0), matrices(1)
    if stacked:
        weights = weights.view(LAYERS * SIDES, EXPERTS, ROWS, COLS)
        grads = grads.view_as(weights)
    named = []
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        parameter = nn.Parameter(weight.bfloat16() if bf16 else weight.clone())
        parameter.main_grad = grad.clone()  # type: ignore[attr-defined]
        named.append((f"layers.{i}.weight", parameter))
    optimizer = MuonClip(named, lr=LR, weight_decay=DECAY, momentum=MOMENTUM)

    def current() -> Tensor:
        masters = {n: t for n, kind, t in optimizer.named_state() if kind == "master"}
        kept = [masters.get(name, parameter.detach()) for name, parameter in named]
        return torch.stack(kept).view(-1, ROWS, COLS)

    if bf16:  # start from the weights themselves, as the peer does, not from their rounding
        for (_, _, state), weight in zip(
            (s for s in optimizer.named_state() if s[1] == "master"), weights, strict=True
        ):
            state.copy_(weight)
    return Side(optimizer.step, current)


def seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def compare(title: str, peer: Side, own: Side, rounds: int) -> float:
    """Alternate the two sides, print both and their ratio, and give the ratio."""
    start = matrices(0)
    times: dict[str, list[float]] = {"peer": [], "own": []}
    for number in range(-2, rounds):  # two rounds of warm-up
        sides = [("peer", peer), ("own", own)]
        for name, side in sides if number % 2 else sides[::-1]:
            elapsed = seconds(side.step)
            if number >= 0:
                times[name].append(elapsed)
    ratio = statistics.median(times["peer"]) / statistics.median(times["own"])
    expected, got = peer.weights(), own.weights()
    apart = float((got - expected).norm() / (expected - start).norm())
    print(f"{title}")
    print(f"  torch.optim.Muon   {spread(times['peer'])} s a step")
    print(f"  MuonClip           {spread(times['own'])} s a step")
    print(f"  ratio              {ratio:.2f}  pairs {spread(paired_ratio(*times.values()))}")
    print(f"  updates differ by  {apart:.2%} (bf16 rounding)", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, help="of both sides; default: torch's own")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print_header(
        f"optimizer step, {LAYERS} layers x {EXPERTS} experts x {SIDES} matrices {ROWS}x{COLS}",
        ["torch"],
    )
    ratios = [
        compare("fp32", torch_muon(False), ours(False, False), arguments.rounds),
        compare("fp32 stacks", torch_muon(False), ours(False, True), arguments.rounds),
        compare("bf16 master", torch_muon(True), ours(True, False), arguments.rounds),
    ]
    verdict = "reached" if min(ratios) >= TARGET else "missed"
    print(f"smallest ratio {min(ratios):.2f}, target {TARGET}: {verdict}")


if __name__ == "__main__":
    main()
