"""The shim shows what it is there to show: barriers that are missing, and barriers that hang."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

BARRIERS = [
    ("cuda/block_reduce.cuh", "__syncthreads();  // all partial results are written"),
    ("cuda/block_reduce.cuh", "__syncthreads();  // all have been read: the next call may write"),
    ("cuda/max_logits.cuh", "__syncthreads();  // the columns are there"),
    ("cuda/max_logits.cuh", "__syncthreads();  // they have been read: the next may be written"),
    ("cuda/rms_norm.cuh", "__syncthreads();  // every group's sum is written"),
]


def backward_is_right(doors: Any, seed: int) -> bool:
    """RMSNorm's gradient through the shim: two sums over a block a row, and one over strips."""
    rows, width = 266, 300  # blocks of two rows, columns in several warps
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, width, generator=random) for _ in range(2))
    weight, scale = torch.ones(width), torch.ones(rows)
    grad_x, grad_weight = torch.empty_like(x), torch.empty(width)
    doors("simt_seed", seed)
    arguments = (grad, x, weight, scale, grad_x, torch.empty(264, width), grad_weight, rows, width)
    doors("rms_norm_backward_cuda_fp32", *arguments)
    want = grad - x * (grad * x).mean(dim=-1, keepdim=True)
    wanted = (grad * x).sum(0)
    close = torch.allclose(grad_x, want, atol=1e-5), torch.allclose(grad_weight, wanted, atol=1e-4)
    return all(close)


def logits_are_right(doors: Any, seed: int) -> bool:
    """The largest logits through the shim: three tiles of keys, three of columns."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 150, 40, generator=random) for _ in range(2))
    partial, largest = torch.empty(3), torch.empty(1)
    doors("simt_seed", seed)
    chosen = torch.ones(1, dtype=torch.bool)
    doors("max_logits_cuda_fp32", q, k, 0, chosen, 1.0, partial, largest, 1, 1, 150, 40)
    hidden = torch.ones(150, 150, dtype=torch.bool).triu(1)
    logits = (q[0, 0] @ k[0, 0].t()).masked_fill(hidden, -torch.inf)
    each = torch.stack([part.max() for part in logits.split(64)])  # of 64 queries
    return torch.allclose(partial, each) and torch.allclose(largest, logits.max())


def are_right(doors: Any, seed: int) -> bool:
    return backward_is_right(doors, seed) and logits_are_right(doors, seed)


def test_every_barrier_is_listed(csrc: Any) -> None:
    """Catches a barrier that nobody has shown to matter."""
    found = [
        (f"cuda/{path.name}", line.strip())
        for path in sorted((csrc / "cuda").iterdir())
        for line in path.read_text().splitlines()
        if "__syncthreads()" in line
    ]
    assert found == BARRIERS


@pytest.mark.parametrize(("file", "barrier"), BARRIERS)
def test_a_missing_barrier_gives_a_wrong_result(
    compile_copy: Callable[[str, str, str], Any], file: str, barrier: str
) -> None:
    """Catches a shim under which threads happen to run in the order that hides a race."""
    without = compile_copy(file, barrier, "")
    assert not all(are_right(without, seed) for seed in range(3))


def test_the_source_as_it_is_gives_the_right_result(doors: Any) -> None:
    """Catches a reference of the test above that is wrong by itself."""
    assert all(are_right(doors, seed) for seed in range(3))


def test_a_barrier_that_not_all_reach_is_reported(doors: Any) -> None:
    """Catches a shim that hangs, or goes on, where a GPU would hang."""
    program = f"import ctypes; ctypes.CDLL({doors.library._name!r}).diverging()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    expected = "block (0,0,0) cannot go on: 16 threads at __syncthreads, 16 at a warp collective"
    assert expected in done.stderr
