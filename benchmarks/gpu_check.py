"""What only a GPU can show, in one run: `make gpu-check`.

    python -m benchmarks.gpu_check [--report gpu-check.md]

On one NVIDIA GPU: every kernel and every library that ``kernels=auto`` would use, against plain
torch; the bandwidth that the kernels reach, against a copy on the device; that they run on torch's
current stream; that the offload engine's copies come neither too early nor too late. On all GPUs
of the machine: the collectives that a run uses, over NCCL. Writes a report and ends with 0 if all
held, 1 if not, 2 where there is no GPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu_cases import backward, cases, compare, forward
from benchmarks.offload_stress import CYCLES_A_SECOND, Hasty, copies_beside_compute, stress
from kimi_pretrain.config.exit_codes import BAD_INPUT, DONE
from kimi_pretrain.ops.registry import explain, select

FAILED = 1
# (tokens, hidden width, expert width): Kimi K2's, and widths that no tile or pack divides.
WIDE, RAGGED = (512, 7168, 2048), (77, 1030, 100)
STREAMED = (4096, 7168, 2048)  # beyond the caches
LEAST_SHARE = 0.7  # of a copy's bandwidth, for what only moves bytes


@dataclass(frozen=True)
class Result:
    """One line of the report; `passed` None: not looked at, and why."""

    part: str
    what: str
    passed: bool | None
    detail: str


def parity(device: str, rows: int, hidden: int, expert: int) -> list[Result]:
    """Every op by whoever ``kernels=auto`` chooses, in bf16 and fp32, against plain torch."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        told = explain("auto", device, dtype)
        for case in cases(dtype, rows, hidden, expert):
            who = told[case.op]
            what = f"{case.op}, {str(dtype).removeprefix('torch.')}, {rows} x {hidden}"
            if who.startswith("reference"):
                results.append(Result("parity", what, None, who))
                continue
            found = compare(case, select(case.op, "auto", device, dtype), device)
            results.append(Result("parity", what, found.passed, f"{who}: {found}"))
    return results


def bandwidth(
    device: str,
    rows: int,
    hidden: int,
    expert: int,
    seconds: Callable[[Callable[[], object]], float],
) -> list[Result]:
    """GB/s of each kernel that is bound by memory, backwards too, and its share of a copy's."""
    results = []
    for case in cases(torch.bfloat16, rows, hidden, expert):
        if explain("auto", device)[case.op].startswith("reference"):
            continue
        op = select(case.op, "auto", device)
        if case.moved is not None:
            work = forward(case, op, device)
            results.append(_bandwidth(case.op, work, case.moved, device, seconds))
        if case.moved_back is not None:
            work = backward(case, op, device)
            what = f"{case.op}, its gradient"
            results.append(_bandwidth(what, work, case.moved_back, device, seconds))
    return results


def _bandwidth(
    what: str,
    work: Callable[[], object],
    moved: int,
    device: str,
    seconds: Callable[[Callable[[], object]], float],
) -> Result:
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source))
    own = seconds(work)
    share = copy / own
    detail = f"{moved / own / 1e9:,.0f} GB/s, {share:.2f} of a copy's {moved / copy / 1e9:,.0f}"
    return Result("bandwidth", what, share >= LEAST_SHARE, detail)


def on_gpu(work: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds of `work` by the GPU's own clock, after warm-up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # the GPU finds all of it queued: no launch is timed
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def streams() -> list[Result]:
    """A kernel on a side stream waits for that stream's work, and for no other's."""
    results = []
    for case in cases(torch.bfloat16, 1024, 1024, 512):
        if not explain("auto", "cuda")[case.op].startswith("native"):
            continue
        op = select(case.op, "auto", "cuda")
        held = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case.arguments]
        want = _first(op(*held)).clone()
        side, done = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(side):
            op(*held)  # takes its memory for this stream
        source = held[0].clone()
        held[0].zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # the current stream is busy for about half a second
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            held[0].copy_(source)  # what a kernel on another stream would not wait for
            got = _first(op(*held))
            done.record()
        done.synchronize()
        alone = not torch.cuda.current_stream().query()
        right = torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        detail = "right" if right else "it did not wait for its own stream's work"
        detail += "" if alone else "; it waited for another stream"
        results.append(Result("streams", case.op, right and alone, detail))
        torch.cuda.synchronize()
    return results


def _first(result: object) -> torch.Tensor:
    chosen = result[0] if isinstance(result, tuple) else result
    assert isinstance(chosen, torch.Tensor)
    return chosen.detach()


def offload(
    device: torch.device, steps: int, elements: int, occupy: Callable[[], Callable[[], bool]]
) -> list[Result]:
    """The offload engine: late copies, a wait that is left out, and copies beside the compute.

    ``steps`` of 4 tensors of ``elements`` fp32 numbers; ``occupy`` as for
    ``copies_beside_compute``.
    """
    kept, spoilt = stress(device, steps, elements), stress(device, steps, elements, broken=Hasty)
    way = copies_beside_compute(device, 64 * elements, occupy)
    moved = f"{kept.wrong} of {kept.tensors} tensors wrong, {kept.back / 1e9:.2f} GB came back"
    held = {
        "right": way.right,
        "pinned": way.pinned or device.type == "cpu",
        "freed": way.freed,
        "beside compute": way.beside,
    }
    lost = [name for name, holds in held.items() if not holds]
    detail = f"{way.out / 1e9:.1f} GB/s to the host, {way.back / 1e9:.1f} back"
    return [
        Result("offload", "late copies", not kept.wrong and not kept.left_in_slab, moved),
        Result("offload", "a wait left out is seen", spoilt.wrong > 0, f"{spoilt.wrong} wrong"),
        Result("offload", "copies", not lost, "; not ".join([detail, *lost])),
    ]


def busy_gpu() -> Callable[[], bool]:
    """Gives the current stream about a second of work; whether it still has some."""
    ended = torch.cuda.Event()
    torch.cuda._sleep(int(CYCLES_A_SECOND))
    ended.record()
    return lambda: not ended.query()


def collectives(device: torch.device) -> list[Result]:
    """Sum, maximum, uneven all-to-all and reduce-scatter among the ranks of the default group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.full((size,), float(rank + 1), device=device)
    total = own.clone()
    dist.all_reduce(total)
    largest = own.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    # Rank r sends r + 1 rows to each; what comes from rank s are s + 1 rows of s.
    sent = torch.full(((rank + 1) * size, 3), float(rank), device=device).bfloat16()
    arriving = [other + 1 for other in range(size)]
    arrived = sent.new_empty(sum(arriving), 3)
    dist.all_to_all_single(arrived, sent, arriving, [rank + 1] * size)
    wanted = torch.arange(size, device=device).repeat_interleave(torch.tensor(arriving).to(device))
    held = {
        "all-reduce": bool((total == size * (size + 1) / 2).all()),
        "maximum": bool((largest == size).all()),
        "uneven all-to-all, bf16": bool((arrived == wanted[:, None]).all()),
    }
    if device.type == "cuda":
        part = own.new_empty(1)
        dist.reduce_scatter_tensor(part, own)
        held["reduce-scatter"] = bool((part == size * (size + 1) / 2).all())
    detail = f"{size} ranks over {dist.get_backend()}"
    return [Result("collectives", what, passed, detail) for what, passed in held.items()]


def rank_of_nccl() -> int:
    """What one rank of the torchrun below does."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    results = collectives(device)
    if dist.get_rank() == 0:
        for result in results:
            print(f"{result.what}: {result.detail}", flush=True)
    dist.destroy_process_group()
    return DONE if all(result.passed for result in results) else FAILED


def nccl() -> Result:
    """The collectives on every GPU of this machine, a rank each."""
    count = torch.cuda.device_count()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={count}", "-m", "benchmarks.gpu_check", "--rank"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Result("collectives", "NCCL", False, f"{count} ranks: nothing within 300 s")
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return Result("collectives", "NCCL", done.returncode == 0, "; ".join(lines[-4:]))


def written(title: str, results: Sequence[Result]) -> str:
    """The report, Markdown."""
    failed = sum(result.passed is False for result in results)
    unseen = sum(result.passed is None for result in results)
    verdict = f"{len(results)} checks, {failed} failed, {unseen} not looked at"
    signs = {True: "held", False: "FAILED", None: "-"}
    rows = [f"| {r.part} | {r.what} | {signs[r.passed]} | {r.detail} |" for r in results]
    head = ["| part | what | | |", "|---|---|---|---|"]
    return "\n".join([f"# {title}", "", verdict, "", *head, *rows, ""])


def exit_code(results: Sequence[Result]) -> int:
    """1 if anything failed, or nothing could be looked at."""
    seen = [result.passed for result in results if result.passed is not None]
    return DONE if seen and all(seen) else FAILED


def title() -> str:
    """The machine and the versions that a report is about."""
    properties = torch.cuda.get_device_properties(0)
    return (
        f"gpu-check: {torch.cuda.device_count()} x {properties.name} "
        f"(sm_{properties.major}{properties.minor}), torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--report", type=Path, default=Path("gpu-check.md"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA GPU here, so nothing was checked")
        return BAD_INPUT
    if chosen.rank:
        return rank_of_nccl()
    results = [
        *parity("cuda", *WIDE),
        *parity("cuda", *RAGGED),
        *bandwidth("cuda", *STREAMED, on_gpu),
        *streams(),
        *offload(torch.device("cuda"), 250, 2**20, busy_gpu),
        nccl(),
    ]
    text = written(title(), results)
    chosen.report.write_text(text)
    print(f"{text}\nwritten to {chosen.report}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
