"""The grouped product against one linear a group."""

import pytest
import torch
from torch.nn.functional import linear

from kimi_pretrain.ops.grouped import grouped_linear


@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 5, 1], [0, 0, 0, 4], [2, 2, 2, 2], [0, 0, 0, 0], [40, 41, 1, 90], [300, 1, 1, 298]],
)
def test_value_and_gradients_equal_a_loop(sizes: list[int]) -> None:
    """A dropped row, padding that leaks, an empty group's weight gradient left uninitialised."""
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(sum(sizes), 3, dtype=torch.float64)
    got = grouped_linear(x, weight, sizes)
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
    grouped_linear(x, weight, [2, 3]).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[1], x.detach()[2:].sum(0).expand(3, 6))


def test_bf16_rows_equal_the_single_product() -> None:
    """Every dtype takes the same path."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16).bfloat16(), torch.randn(2, 8, 16).bfloat16()
    got = grouped_linear(x, weight, [4, 3])
    want = torch.cat(
        [x[:4].double() @ weight[0].double().t(), x[4:].double() @ weight[1].double().t()]
    )
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-2)
