"""Results of operations that are looked up must be those that torch would find."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_pretrain.dry_run.shapes import Effect, Operation, effect, forgotten

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def known(func: Any, *args: Any, **kwargs: Any) -> Operation:
    operation = Operation(func)
    assert operation.repeat(args, kwargs) is NotImplemented
    operation.call(args, kwargs)
    assert operation.repeat(args, kwargs) is not NotImplemented
    return operation


@pytest.mark.parametrize(
    ("func", "first", "other"),
    [
        (aten.add.Tensor, (meta(2, 3), meta(2, 3)), (meta(3, 2), meta(3, 2))),
        (aten.add.Tensor, (meta(2), meta(2)), (meta(2), meta(2, dtype=torch.float64))),
        (aten.add.Scalar, (meta(2, dtype=torch.int64), 1), (meta(2, dtype=torch.int64), 1.0)),
        (aten.add.Scalar, (meta(2, dtype=torch.bool), True), (meta(2, dtype=torch.bool), 1)),
        (aten.sum.dim_IntList, (meta(2, 3), [0]), (meta(2, 3), [1])),
        (aten.mul.Tensor, (meta(2, 3), meta(2, 3)), (meta(2, 3), meta(3, 2).t())),
    ],
)
def test_another_call_is_not_taken_for_a_known_one(
    func: Any, first: tuple[Any, ...], other: tuple[Any, ...]
) -> None:
    """Catches a key without shape, dtype, stride, or a number's type, which decides promotion."""
    assert known(func, *first).repeat(other, {}) is NotImplemented


def test_the_name_of_an_argument_counts() -> None:
    """Catches a key of values alone: keepdim and another flag both may be True."""
    x = meta(2, 3)
    operation = known(aten.sum.dim_IntList, x, [0], keepdim=True)
    assert operation.repeat((x, [0]), {"dtype": True}) is NotImplemented
    assert operation.repeat((x, [0], True), {}) is NotImplemented


def test_a_parameter_is_known_as_a_tensor_and_nan_as_itself() -> None:
    """Catches weights that are looked up by identity, and a call that is never found again."""
    known(aten.mm.default, meta(2, 3), nn.Parameter(meta(3, 4)))
    operation = known(aten.add.Scalar, meta(2), float("nan"))
    assert operation.repeat((meta(2), float("nan")), {}) is not NotImplemented


def test_results_have_torchs_shape_stride_and_dtype() -> None:
    """Catches several results given as one, or a transposed one given as dense."""
    x = meta(4, 5, dtype=torch.bfloat16)
    values, places = known(aten.topk.default, x, 2).repeat((x, 2), {})
    assert (values.shape, values.dtype) == ((4, 2), torch.bfloat16)
    assert (places.shape, places.dtype) == ((4, 2), torch.int64)
    made = known(aten.add.Tensor, x.t(), x.t()).repeat((x.t(), x.t()), {})
    assert (made.shape, made.stride(), made.is_meta) == ((5, 4), (1, 5), True)


def test_what_writes_gives_back_the_operand() -> None:
    """Catches a copy where the program goes on with the tensor that it wrote into."""
    x = meta(3)
    assert effect(aten.add_.Tensor) is Effect.WRITES
    assert known(aten.add_.Tensor, x, x).repeat((x, x), {}) is x


def test_forgetting_reaches_into_lists_and_leaves_the_rest() -> None:
    """Catches a real operand of `cat`, which meta tensors cannot meet."""
    found = forgotten({"all": [torch.ones(2), meta(3)], "dim": 0})
    assert [(x.is_meta, len(x)) for x in found["all"]] == [(True, 2), (True, 3)]
    assert found["dim"] == 0
