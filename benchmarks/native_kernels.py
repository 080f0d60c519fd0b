"""The CPU kernels of csrc/ against memcpy and against the same work in torch.

    python -m benchmarks.native_kernels [--threads 1 2] [--rounds 15] [--only SwiGLU]

Each op runs on 2,048 rows of 7,168 (SwiGLU: 2 x 2,048), K2's hidden and expert widths, larger
than the caches but for the third level. All sides alternate in one process with the same number of
threads; the side that begins changes each round. Peers are eager torch:

    quantise     amax of each 1x128 tile, division, `.to(float8_e4m3fn)`
    dequantise   `.to(float32)`, product with the scales, rounding to bf16
    SwiGLU       silu(gate) * up and its autograd
    of tiles     the same after `dequantise`; its backward runs the forward again, which is not kept
    rows         to 8 experts' order: `index_select`; back: the rows in token order by
                 `index_select`, product with the probabilities, sum over 8; and its autograd
    RMSNorm      this project's plain torch, in fp32 (torch's own F.rms_norm is slower in bf16)
    max logits   this project's plain torch: blocks of fp32 products, 16 heads of 1,024 tokens

GB/s counts every byte of the inputs and outputs once. Two copies of as many bytes stand beside it:
torch's `copy_`, and the C library's memcpy, one call a thread, which stores past the caches. With
one thread the clock is the process's CPU time, which others on the machine do not stretch by taking
the core; with more it is the wall's. Neighbours still share caches and memory: the load average is
printed.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report_lines import paired_ratio, print_header, spread
from kimi_pretrain.ops.kernels import REFERENCE
from kimi_pretrain.ops.registry import explain, select

ROWS, HIDDEN, EXPERT = 2048, 7168, 2048
SLOTS = 8  # of a token: ROWS are those of so many experts


@dataclass
class Case:
    """One op: both sides, the bytes it must move, and what the ratios are held to."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    moved: int  # bytes
    times_peer: float | None = None
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


def plain_swiglu_tiles_backward(grad: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    gate_up = plain_dequantise(q, scale).view(grad.shape[0], -1).requires_grad_()
    return torch.autograd.grad(plain_swiglu(gate_up), gate_up, grad)[0]


def plain_weighted_rows(rows: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    by_token = rows.index_select(0, inverse.flatten()).view(*inverse.shape, -1)
    return (by_token * weights[..., None].to(rows.dtype)).sum(1)


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
    queries, keys = (torch.randn(1, 16, 1024, 192).bfloat16() for _ in range(2))
    logits = (queries, keys, 0.07, None, torch.ones(16, dtype=torch.bool))

    def plain_norm() -> Tensor:
        normalised: Tensor = REFERENCE.rms_norm(leaf, weight, 1e-6)
        return normalised

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
        Case(
            "max logits",
            lambda: select("max_logits", "native")(*logits),
            lambda: REFERENCE.max_logits(*logits),
            2 * queries.nbytes,
            1,
        ),
    ]


def cases_of_tiles() -> list[Case]:
    """SwiGLU of rows stored as FP8 tiles, which has no target."""
    gate_up, grad = torch.randn(ROWS, 2 * EXPERT).bfloat16(), torch.randn(ROWS, EXPERT).bfloat16()
    q, scale = select("quantise_tiles", "native")(gate_up)
    plain_q, plain_scale = plain_quantise(gate_up)
    forward, backward = select("swiglu_tiles", "native"), select("swiglu_tiles_backward", "native")
    stored = q.nbytes + scale.nbytes
    return [
        Case(
            "SwiGLU of tiles",
            lambda: forward(q, scale, torch.bfloat16),
            lambda: plain_swiglu(plain_dequantise(plain_q, plain_scale).view_as(gate_up)),
            stored + grad.nbytes,
        ),
        Case(
            "SwiGLU of tiles, backward",
            lambda: backward(grad, q, scale),
            lambda: plain_swiglu_tiles_backward(grad, plain_q, plain_scale),
            stored + grad.nbytes + gate_up.nbytes,
        ),
    ]


def cases_of_rows() -> list[Case]:
    """Rows to expert order and back, which have no target."""
    tokens = ROWS // SLOTS
    x, grad = torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, HIDDEN).bfloat16()
    order = torch.randperm(ROWS)
    inverse, of_token = order.argsort().view(tokens, SLOTS), order // SLOTS
    rows = torch.randn(ROWS, HIDDEN).bfloat16().requires_grad_()
    weights = torch.rand(tokens, SLOTS).requires_grad_()
    take, weighted = select("take_rows", "native"), select("weighted_rows", "native")
    moved = rows.nbytes + x.nbytes
    return [
        Case(
            "rows to expert order",
            lambda: take(x, order, inverse),
            lambda: x.index_select(0, of_token),
            moved,
        ),
        Case(
            "rows back, weighted",
            lambda: weighted(rows, weights, order, inverse),
            lambda: plain_weighted_rows(rows, weights, inverse),
            moved,
        ),
        Case(
            "rows back, weighted, backward",
            gradient(weighted(rows, weights, order, inverse), [rows, weights], grad),
            gradient(plain_weighted_rows(rows, weights, inverse), [rows, weights], grad),
            moved + rows.nbytes,
        ),
    ]


def seconds(work: Callable[[], object], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    begun = clock()
    work()
    return clock() - begun


def alternate(sides: list[Callable[[], object]], rounds: int, threads: int) -> list[list[float]]:
    """Seconds of each side a round, after two rounds of warm-up."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(-2, rounds):
        order = list(range(len(sides)))
        for side in order if number % 2 else order[::-1]:
            elapsed = seconds(sides[side], threads)
            if number >= 0:
                times[side].append(elapsed)
    return times


def copies(moved: int, pool: ThreadPoolExecutor, threads: int) -> list[Callable[[], object]]:
    """torch's copy and the C library's, of as many bytes as are moved in all."""
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    share = -(-source.nbytes // threads)

    def memcpy(part: int) -> None:
        at = part * share
        size = min(share, source.nbytes - at)
        ctypes.memmove(target.data_ptr() + at, source.data_ptr() + at, size)

    return [lambda: target.copy_(source), lambda: list(pool.map(memcpy, range(threads)))]


def compare(case: Case, rounds: int, pool: ThreadPoolExecutor, threads: int) -> None:
    sides = [case.ours, case.peer, *copies(case.moved, pool, threads)]
    ours, peer, copy, memcpy = alternate(sides, rounds, threads)
    ratio = statistics.median(peer) / statistics.median(ours)
    print(f"{case.name}")
    print(
        f"  ours    {spread([1e3 * t for t in ours])} ms, {case.moved / min(ours) / 1e9:.1f} GB/s"
    )
    print(f"  torch   {spread([1e3 * t for t in peer])} ms")
    pairs = spread(paired_ratio(peer, ours))
    print(f"  ratio   {ratio:.2f}  pairs {pairs}{verdict(ratio, case.times_peer)}")
    for name, other in (("torch's copy", copy), ("memcpy", memcpy)):
        share = statistics.median(other) / statistics.median(ours)
        took = spread([1e3 * t for t in other])
        print(f"  bandwidth of {name} {took} ms: {share:.2f}{verdict(share, case.of_memcpy)}")
    sys.stdout.flush()


def verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return f", target {target:g}: {'reached' if value >= target else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    arguments = parser.parse_args()
    print_header(f"native kernels, bf16, {ROWS} rows of {HIDDEN} and {2 * EXPERT}", ["torch"])
    print(f"kernels: {', '.join(f'{op} {who}' for op, who in explain('native').items())}")
    with ThreadPoolExecutor() as pool:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            print(f"## threads: {threads}, load average {os.getloadavg()[0]:.1f}")
            for case in [*cases(), *cases_of_tiles(), *cases_of_rows()]:
                if arguments.only not in case.name:
                    continue
                compare(case, arguments.rounds, pool, threads)


if __name__ == "__main__":
    main()
