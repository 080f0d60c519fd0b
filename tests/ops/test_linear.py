"""The linear operation against torch's own."""

import torch

from kimi_pretrain.ops.linear import linear


def test_gradients_equal_torchs() -> None:
    """Catches a stack whose rows are multiplied in another order than they lie."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 8, dtype=torch.float64)
    got = torch.autograd.grad(linear(x, weight), [x, weight], grad)
    plain = torch.nn.functional.linear(x, weight.flatten(0, 1))
    want = torch.autograd.grad(plain, [x, weight], grad)
    torch.testing.assert_close(linear(x, weight), plain, rtol=0.0, atol=0.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_a_wide_input_widens_the_product() -> None:
    """Catches a router that scores in bf16: 1 + 2^-9 is 1 there."""
    x = torch.full((1, 1), 1 + 2.0**-9)
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    result = linear(x, weight)
    assert result.dtype == torch.float32
    assert result.item() == 1 + 2.0**-9


def test_no_gradient_is_computed_that_nobody_wants() -> None:
    """Catches the input's gradient at the first layer of a frozen model."""
    x = torch.randn(3, 5)
    weight = torch.randn(4, 5, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
