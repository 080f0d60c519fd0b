"""Operations on tensors without memory, and what is read of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.dry_run.memory import LiveBytes
from kimi_pretrain.dry_run.shapes import Effect, Operation, effect
from kimi_pretrain.dry_run.unknown import Unknown


@pytest.fixture
def mode() -> Unknown:
    return Unknown(LiveBytes())


def unknown(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_reads_give_ones(mode: Unknown) -> None:
    """Catches a program that stops at its first look at a value."""
    with mode:
        assert float(unknown()) == 1.0
        assert int(unknown(dtype=torch.int64)) == 1
        assert bool(unknown(5, dtype=torch.bool).all()) is True
        assert unknown(2).tolist() == [1.0, 1.0]
        assert unknown(2, 3).nonzero().shape == (6, 2)
        assert unknown(3).to("cpu", torch.float64).tolist() == [1.0, 1.0, 1.0]


def test_unknown_and_real_give_unknown(mode: Unknown) -> None:
    """Catches a real index or table that cannot meet an activation."""
    rows, order = unknown(4, 8, dtype=torch.bfloat16), torch.tensor([3, 0])
    with mode:
        taken = rows.index_select(0, order)
        scaled = torch.ones(8, dtype=torch.float64) * rows
    assert (taken.shape, taken.dtype, taken.is_meta) == ((2, 8), torch.bfloat16, True)
    assert (scaled.dtype, scaled.is_meta) == (torch.float64, True)


def test_real_operations_stay_real(mode: Unknown) -> None:
    """Catches counts and splits that lose their values."""
    with mode:
        assert torch.bincount(torch.tensor([0, 2, 2]), minlength=4).tolist() == [1, 0, 2, 0]


def test_what_is_written_from_unknown_reads_as_ones(mode: Unknown) -> None:
    """Catches a record that stays at minus infinity, so that no head is ever clipped."""
    record = torch.full((2, 3), -torch.inf)
    with mode:
        record[1] = unknown(3)
        record[0] += unknown(3)
    assert record.tolist() == [[1.0] * 3] * 2


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "makes": lambda x: x.softmax(-1),
    "makes two": lambda x: x.topk(2, dim=-1),
    "promotes by type": lambda x: (x.to(torch.int64) + 1, x.to(torch.int64) + 1.0),
    "keeps strides": lambda x: torch.empty_like(x.t()),
    "writes": lambda x: x.add_(1.0),
    "writes elsewhere": lambda x: torch.mm(x, x.t(), out=x.new_empty(4, 4)),
    "views": lambda x: x[1:].view(-1),
    "splits": lambda x: x.chunk(2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_repetition_gives_what_the_first_time_gave(
    mode: Unknown, call: Callable[[Tensor], Any]
) -> None:
    """Catches a looked-up result of another shape, stride, dtype or memory than torch's own."""
    plain = _described(call(unknown(4, 6)))
    with mode:
        first, second = (_described(call(unknown(4, 6))) for _ in range(2))
    assert first == plain
    assert second == plain


def test_a_repetition_with_a_real_operand_is_looked_up(
    mode: Unknown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rotary tables, indices and NaNs that send every operation on them the slow way."""
    x, table, rows = unknown(4, 6), torch.ones(6), torch.tensor([1, 0])
    calls: list[Any] = []
    call = Operation.call
    monkeypatch.setattr(
        Operation, "call", lambda self, *args: calls.append(self.func) or call(self, *args)
    )
    with mode:
        for _ in range(3):
            assert (x * table).shape == (4, 6)
            assert x.index_select(0, rows).shape == (2, 6)
            assert x.masked_fill(x > 0, float("nan")).shape == (4, 6)
    assert len(calls) == 4


def test_a_repetition_has_memory_of_its_own(mode: Unknown) -> None:
    """Catches results that share a storage, or views and writes that are counted as new."""
    x = unknown(4, 6)
    with mode:
        results = [x.exp() for _ in range(3)]
        results[0].add_(1.0)
        results[0].view(-1)
    assert mode.memory.now == 3 * 4 * 6 * 4


@pytest.mark.parametrize(
    ("func", "does"),
    [
        (torch.ops.aten.add.Tensor, Effect.MAKES),
        (torch.ops.aten.topk.default, Effect.MAKES),
        (torch.ops.aten.add_.Tensor, Effect.WRITES),
        (torch.ops.aten.bmm.out, Effect.WRITES),
        (torch.ops.aten.view.default, Effect.VIEWS),
        (torch.ops.aten.split.Tensor, Effect.VIEWS),
        (torch.ops.aten._foreach_mul_.Scalar, Effect.ELSE),
        (torch.ops.aten._local_scalar_dense.default, Effect.ELSE),
    ],
)
def test_effects_are_read_from_schemas(func: Any, does: Effect) -> None:
    """Catches an operation that is looked up although it changes something else."""
    assert effect(func) is does


def _described(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype
    return [_described(inner) for inner in result]
