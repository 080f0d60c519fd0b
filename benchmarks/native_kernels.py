"""The CPU kernels of csrc/ against memcpy and against the same work in torch.

    python -m benchmarks.native_kernels [--threads 1 2] [--rounds 15]

Each op runs on 2,048 rows of 7,168 (SwiGLU: 2 x 2,048), K2's hidden and expert widths, larger
than the caches. The two sides alternate in one process with the same number of threads; the side
that begins changes each round. Peers are eager torch:

    quantise     amax of each 1x128 tile, division, `.to(float8_e4m3fn)`
    dequantise   `.to(float32)`, product with the scales, rounding to bf16
    SwiGLU       silu(gate) * up and its autograd
    RMSNorm      torch.nn.functional.rms_norm and its autograd

GB/s counts every byte of the inputs and outputs once, and memcpy's both ways likewise. All of
them, memcpy too (`Tensor.clone`), write into new memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report_lines import paired_ratio, print_header, spread
from kimi_pretrain.ops.registry import explain, select

ROWS, HIDDEN, EXPERT = 2048, 7168, 2048


@dataclass
class Case:
    """One op: both sides, the bytes it must move, and what the ratios are held to."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    moved: int  # bytes
    times_peer: float
    of_memcpy: float | None = None


def plain_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = x.view(-1, 128).float()
    scale = tiles.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (tiles / scale).to(torch.float8_e4m3fn), scale


def plain_dequantise(q: Tensor, scale: Tensor) -> Tensor:
    return (q.float() * scale).bfloat16()


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gradient(output: Tensor, leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def cases() -> list[Case]:
    x = torch.randn(ROWS, HIDDEN).bfloat16()
    quantise, dequantise = select("quantise_tiles", "native"), select("dequantise_tiles", "native")
    q, scale = quantise(x)
    plain_q, plain_scale = plain_quantise(x)
    stored = q.nbytes + scale.nbytes

    gate_up = torch.randn(ROWS, 2 * EXPERT).bfloat16().requires_grad_()
    grad_y = torch.randn(ROWS, EXPERT).bfloat16()
    swiglu = select("swiglu", "native")

    leaf, weight = x.clone().requires_grad_(), torch.ones(HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn(ROWS, HIDDEN).bfloat16()
    norm = select("rms_norm", "native")

    def plain_norm() -> Tensor:
        return torch.nn.functional.rms_norm(leaf, (HIDDEN,), weight, 1e-6)

    return [
        Case("quantise", lambda: quantise(x), lambda: plain_quantise(x), x.nbytes + stored, 7, 0.6),
        Case(
            "dequantise",
            lambda: dequantise(q, scale, torch.bfloat16),
            lambda: plain_dequantise(plain_q, plain_scale),
            x.nbytes + stored,
            30,
            0.6,
        ),
        Case(
            "SwiGLU",
            lambda: swiglu(gate_up),
            lambda: plain_swiglu(gate_up),
            gate_up.nbytes + grad_y.nbytes,
            2,
        ),
        Case(
            "SwiGLU backward",
            gradient(swiglu(gate_up), [gate_up], grad_y),
            gradient(plain_swiglu(gate_up), [gate_up], grad_y),
            2 * gate_up.nbytes + grad_y.nbytes,
            2,
        ),
        Case("RMSNorm", lambda: norm(leaf, weight, 1e-6), plain_norm, 2 * x.nbytes, 2),
        Case(
            "RMSNorm backward",
            gradient(norm(leaf, weight, 1e-6), [leaf, weight], grad),
            gradient(plain_norm(), [leaf, weight], grad),
            3 * x.nbytes,
            2,
        ),
    ]


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alternate(sides: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each side a round, after two rounds of warm-up."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(-2, rounds):
        order = list(range(len(sides)))
        for side in order if number % 2 else order[::-1]:
            elapsed = seconds(sides[side])
            if number >= 0:
                times[side].append(elapsed)
    return times


def compare(case: Case, rounds: int) -> None:
    source = torch.ones(case.moved // 2, dtype=torch.uint8)
    ours, peer, memcpy = alternate([case.ours, case.peer, source.clone], rounds)
    ratio = statistics.median(peer) / statistics.median(ours)
    share = statistics.median(memcpy) / statistics.median(ours)
    print(f"{case.name}")
    print(
        f"  ours    {spread([1e3 * t for t in ours])} ms, {case.moved / min(ours) / 1e9:.1f} GB/s"
    )
    print(f"  torch   {spread([1e3 * t for t in peer])} ms")
    pairs = spread(paired_ratio(peer, ours))
    print(f"  ratio   {ratio:.2f}  pairs {pairs}, {verdict(ratio, case.times_peer)}")
    bound = "" if case.of_memcpy is None else f", {verdict(share, case.of_memcpy)}"
    print(f"  share of memcpy's bandwidth {share:.2f}{bound}", flush=True)


def verdict(value: float, target: float) -> str:
    return f"target {target:g}: {'reached' if value >= target else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print_header(f"native kernels, bf16, {ROWS} rows of {HIDDEN} and {2 * EXPERT}", ["torch"])
    print(f"kernels: {', '.join(f'{op} {who}' for op, who in explain('native').items())}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"## threads: {threads}")
        for case in cases():
            compare(case, arguments.rounds)


if __name__ == "__main__":
    main()
