"""The grouped product against one linear a group, in every way of forming runs."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kimi_pretrain.ops.grouped import group_layout, grouped_linear, pad_rows, unpad_rows

SMALL, LARGE = 1.0, 1e12  # FLOPs a row: calls are dear, or padding is


def product(x: Tensor, weight: Tensor, sizes: list[int], flops_per_row: float) -> Tensor:
    layout = group_layout(sizes, flops_per_row, x.dtype)
    return unpad_rows(grouped_linear(pad_rows(x, layout), weight, layout), layout)


@pytest.mark.parametrize("flops", [SMALL, 2e5, LARGE], ids=["one_run", "some_runs", "no_runs"])
@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 5, 1], [0, 0, 0, 4], [8, 8, 8, 8], [0, 0, 0, 0], [40, 41, 1, 90], [300, 1, 1, 298]],
)
def test_value_and_gradients_equal_a_loop(sizes: list[int], flops: float) -> None:
    """A dropped row, padding that leaks, an empty group's weight gradient left uninitialised."""
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(sum(sizes), 3, dtype=torch.float64)
    got = product(x, weight, sizes, flops)
    want = torch.cat([linear(r, w) for r, w in zip(x.split(sizes), weight, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for g, w in zip(
        torch.autograd.grad(got, [x, weight], grad),
        torch.autograd.grad(want, [x, weight], grad),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)
        assert g.is_contiguous()


def test_broadcast_gradient() -> None:
    """The stride-0 gradient of a sum, on which torch's own grouped_mm fails."""
    x = torch.randn(5, 6, requires_grad=True)
    weight = torch.randn(2, 3, 6, requires_grad=True)
    product(x, weight, [2, 3], LARGE).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[1], x.detach()[2:].sum(0).expand(3, 6))


def test_bf16_rows_equal_the_single_product() -> None:
    """Every dtype takes the same path."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16).bfloat16(), torch.randn(2, 8, 16).bfloat16()
    parts = [x[:4].double() @ weight[0].double().t(), x[4:].double() @ weight[1].double().t()]
    got = product(x, weight, [4, 3], SMALL)
    torch.testing.assert_close(got.double(), torch.cat(parts), rtol=2**-8, atol=1e-2)


def test_large_experts_are_neither_padded_nor_copied() -> None:
    """At K2's widths a padded row costs more than a call: 44 million parameters an expert."""
    layout = group_layout([512, 3, 0, 511], 2 * 7168 * 2048, torch.bfloat16)
    assert [run.rows for run in layout.runs] == [512, 3, 0, 511]
    x = torch.randn(1026, 2)
    assert pad_rows(x, layout) is x
    assert unpad_rows(x, layout) is x


def test_small_equal_experts_are_one_product() -> None:
    """One call an expert would take several times the time of the arithmetic."""
    layout = group_layout([20] * 16, 2 * 128 * 112, torch.bfloat16)
    assert [(run.first, run.last, run.rows) for run in layout.runs] == [(0, 16, 24)]


def test_one_crowded_expert_does_not_pad_the_others() -> None:
    layout = group_layout([20] * 7 + [5000] + [20] * 8, 2 * 128 * 112, torch.bfloat16)
    assert layout.rows < 6000
