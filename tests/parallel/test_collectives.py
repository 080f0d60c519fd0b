"""Collectives over real gloo ranks, against what the ranks' tensors say they must give."""

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.collectives import Group, Handle
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks

SIZES = (2, 4)


def _everyone(size: int, timeout: float = 60.0) -> Group:
    return open_world(ParallelConfig(dp=size, timeout_seconds=timeout)).everyone


def _rows(sender: int, receiver: int) -> int:
    """Rows that one rank sends another: uneven, and none between some."""
    return (3 * sender + 2 * receiver) % 4


def _content(sender: int, receiver: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, 2], told apart by sender, receiver and row."""
    rows = torch.arange(_rows(sender, receiver) * 2).view(-1, 2)
    return (rows + 16 * sender + 4 * receiver).to(dtype)


def _exchange(rank: int, size: int, dtype: torch.dtype) -> tuple[bool, dict[str, int]]:
    group = _everyone(size)
    everyone = range(size)
    sent = torch.cat([_content(rank, peer, dtype) for peer in everyone])
    expected = torch.cat([_content(peer, rank, dtype) for peer in everyone])
    arrived = torch.zeros_like(expected)
    handle = group.all_to_all(
        arrived,
        sent,
        output_splits=[_rows(peer, rank) for peer in everyone],
        input_splits=[_rows(rank, peer) for peer in everyone],
    )
    handle.wait()
    handle.wait()
    same = torch.equal(arrived.view(torch.uint8), expected.view(torch.uint8))
    return same, group.traffic.sent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_of_uneven_parts(size: int, dtype: torch.dtype) -> None:
    """Catches rows at the wrong rank, in the wrong order or rounded; and bytes miscounted."""
    for rank, (same, sent) in enumerate(run_ranks(size, _exchange, dtype)):
        rows = sum(_rows(rank, peer) for peer in range(size) if peer != rank)
        assert same
        assert sent == {"all_to_all": rows * 2 * dtype.itemsize}


def _empty_exchange(rank: int, size: int) -> tuple[int, float]:
    """Everything goes to rank 0, and nothing at all the second time; both in flight at once."""
    group = _everyone(size)
    sent = torch.full((3, 2), float(rank))
    to_first = [3] + [0] * (size - 1)
    arrived = torch.zeros((3 * size if rank == 0 else 0, 2))
    splits = [3] * size if rank == 0 else [0] * size
    nothing = torch.zeros((0, 5))
    handles = [
        group.all_to_all(arrived, sent, splits, to_first),
        group.all_to_all(nothing.clone(), nothing, [0] * size, [0] * size),
    ]
    for handle in reversed(handles):
        handle.wait()
    return arrived.shape[0], float(arrived.sum())


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_with_empty_ranks(size: int) -> None:
    """Catches a hang or an error where a rank receives nothing, or nobody sends anything."""
    total = sum(6.0 * rank for rank in range(size))
    assert run_ranks(size, _empty_exchange) == [(3 * size, total)] + [(0, 0.0)] * (size - 1)


def _equal_exchange(rank: int, size: int) -> list[int]:
    group = _everyone(size)
    sent = torch.arange(size) + 10 * rank
    arrived = torch.empty_like(sent)
    group.all_to_all(arrived, sent).wait()
    return arrived.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_of_equal_parts(size: int) -> None:
    """Catches an exchange of counts that is not the transpose."""
    expected = [[10 * peer + rank for peer in range(size)] for rank in range(size)]
    assert run_ranks(size, _equal_exchange) == expected


def _values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank), dtype=dtype)


def _reduce(rank: int, size: int, dtype: torch.dtype, inside: bool) -> tuple[Any, Any, int]:
    group = _everyone(size)
    whole = _values(rank, size * 1000, dtype)
    before = whole.clone()
    own = slice(rank * 1000, (rank + 1) * 1000)
    output = whole[own] if inside else torch.empty(1000, dtype=dtype)
    group.reduce_scatter(output, whole).wait()
    if inside:
        before[own] = output
    assert torch.equal(whole, before), "another part of the input changed"
    return output, group.traffic.sent, rank


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_sums_in_the_order_of_ranks(
    size: int, dtype: torch.dtype, inside: bool
) -> None:
    """Catches a sum whose bits depend on who came first, or one that overwrites its input."""
    expected = _values(0, size * 1000, dtype)
    for peer in range(1, size):
        expected += _values(peer, size * 1000, dtype)
    for output, sent, rank in run_ranks(size, _reduce, dtype, inside):
        assert torch.equal(output, expected[rank * 1000 : (rank + 1) * 1000])
        assert sent == {"reduce_scatter": (size - 1) * 1000 * dtype.itemsize}


def _gather(rank: int, size: int, dtype: torch.dtype, inside: bool) -> tuple[Any, Any]:
    group = _everyone(size)
    whole = torch.zeros(size * 10).to(dtype)
    own = whole[rank * 10 : (rank + 1) * 10] if inside else torch.empty(10).to(dtype)
    own.copy_((torch.arange(10) + 10 * rank).to(dtype))
    group.all_gather(whole, own).wait()
    return whole.float(), group.traffic.sent


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("size", SIZES)
def test_all_gather(size: int, dtype: torch.dtype, inside: bool) -> None:
    """Catches parameters that come back in another order, also where they lie in place."""
    expected = torch.arange(size * 10).to(dtype).float()
    for whole, sent in run_ranks(size, _gather, dtype, inside):
        assert torch.equal(whole, expected)
        assert sent == {"all_gather": (size - 1) * 10 * dtype.itemsize}


def _small_ones(rank: int, size: int) -> dict[str, Any]:
    group = _everyone(size)
    largest = torch.tensor([-float("inf"), -2.0 - rank, float(rank), 5.0])
    total = torch.tensor([rank + 1, 2**40], dtype=torch.int64)
    first = torch.tensor([float(rank + 7)], dtype=torch.bfloat16)
    handles = [group.all_reduce_max(largest), group.all_reduce_sum(total), group.broadcast(first)]
    for handle in handles:
        handle.wait()
    group.barrier()
    return {
        "largest": largest.tolist(),
        "total": total.tolist(),
        "first": float(first),
        "texts": group.gather_texts("é" * rank),
        "empty": group.gather_texts(""),
        "sent": dict(group.traffic.sent),
    }


@pytest.mark.parametrize("size", SIZES)
def test_maxima_sums_broadcasts_and_texts(size: int) -> None:
    """Catches a maximum that starts at zero, sums in the wrong type, and text cut mid-letter."""
    for rank, found in enumerate(run_ranks(size, _small_ones)):
        assert found["largest"] == [-float("inf"), -2.0, size - 1.0, 5.0]
        assert found["total"] == [size * (size + 1) // 2, size * 2**40]
        assert found["first"] == 7.0
        assert found["texts"] == ["é" * peer for peer in range(size)]
        assert found["empty"] == [""] * size
        assert found["sent"].get("broadcast", 0) == (2 if rank == 0 else 0)


def test_narrow_sums_are_refused() -> None:
    """Catches gradients or statistics summed in bf16, where every step loses bits."""
    group = Group("dp")
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        tensor = torch.zeros(4, dtype=dtype)
        with pytest.raises(ValueError, match="sums in fp32 or fp64"):
            group.reduce_scatter(tensor, tensor)
        with pytest.raises(ValueError, match="sums in fp32 or fp64"):
            group.all_reduce_sum(tensor)


def test_a_group_of_one_copies() -> None:
    """Catches a single process whose outputs stay empty."""
    group = Group("dp")
    given, output = torch.arange(6.0), torch.zeros(6)
    for operation in (group.all_to_all, group.reduce_scatter, group.all_gather):
        output.zero_()
        operation(output, given).wait()
        assert torch.equal(output, given)
    group.all_reduce_sum(output).wait()
    group.all_reduce_max(output).wait()
    group.broadcast(output).wait()
    group.barrier()
    assert torch.equal(output, given)
    assert group.gather_texts("alone") == ["alone"]
    assert group.traffic.total == 0


def _one_stays_away(rank: int, size: int, operation: str) -> tuple[float, str]:
    group = _everyone(size, timeout=2.0)
    before = time.perf_counter()
    if rank == size - 1:
        time.sleep(4)
        return 0.0, ""
    tensor = torch.zeros(size * 4)
    try:
        if operation == "reduce_scatter":
            group.reduce_scatter(tensor[:4].clone(), tensor).wait()
        elif operation == "all_gather":
            group.all_gather(tensor, tensor[:4].clone()).wait()
        elif operation == "all_to_all":
            group.all_to_all(tensor.clone(), tensor).wait()
        else:
            group.barrier()
    except PeerError as error:
        return time.perf_counter() - before, str(error)
    return time.perf_counter() - before, "no error"


@pytest.mark.parametrize("operation", ["reduce_scatter", "all_gather", "all_to_all", "barrier"])
def test_a_rank_that_stays_away_is_an_error_in_time(operation: str) -> None:
    """Catches torch's half hour of silence before a hang ends."""
    name = "all_reduce" if operation == "barrier" else operation
    for seconds, text in run_ranks(3, _one_stays_away, operation)[:-1]:
        assert text.startswith(f"{name} over the world group of ranks 0, 1, 2: "), text
        assert "\n" not in text
        assert 1 < seconds < 3.5


class _Late:
    """Torch's handle of an operation whose peer stays away; counts who waits."""

    def __init__(self) -> None:
        self.waits = 0

    def is_completed(self) -> bool:
        return False

    def wait(self, deadline: timedelta) -> None:
        self.waits += 1
        raise RuntimeError(f"no answer within {deadline.total_seconds():g} s")


def test_a_failure_stays_one() -> None:
    """Catches a second wait that returns as if the result were there: its tensor holds anything.
    Another look does not take another deadline."""
    late, finished = _Late(), []
    handle = Handle(late, "all_reduce", 2.0, finish=lambda: finished.append(1))
    for _ in range(2):
        with pytest.raises(PeerError, match=r"^all_reduce: no answer within 2 s$"):
            handle.wait()
    assert (late.waits, finished) == (1, [])


def _one_is_killed(rank: int, size: int) -> str:
    group = _everyone(size, timeout=20.0)
    group.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(3):
            group.barrier()
    except PeerError as error:
        return str(error)
    return "no error"


def test_a_killed_peer_is_an_error() -> None:
    """Catches a rank that waits for one that is gone, or dies with a gloo traceback."""
    before = time.perf_counter()
    texts = run_ranks(3, _one_is_killed, lost=(1,))
    assert texts[1] is None
    for text in (texts[0], texts[2]):
        assert text.startswith("all_reduce over the world group"), text
    assert time.perf_counter() - before < 15
