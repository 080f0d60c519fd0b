"""RMSNorm's analytic gradient and its precision."""

import pytest
import torch

from kimi_pretrain.ops.norm import rms_norm


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_value_and_gradients_equal_autograd(eps: float) -> None:
    """A wrong place of eps, or a missing projection term in backward."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 8, dtype=torch.float64)
    got, want = rms_norm(x, weight, eps), plain(x, weight, eps)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for g, w in zip(
        torch.autograd.grad(got, [x, weight], grad),
        torch.autograd.grad(want, [x, weight], grad),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)


def test_bf16_is_rounded_once() -> None:
    """A second rounding, of statistics or of a product, shows in one of five elements."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    want = plain(x.double(), weight.double(), 1e-6)
    assert (rms_norm(x, weight, 1e-6) == want.bfloat16()).double().mean() > 0.999


def test_strided_input_and_gradient() -> None:
    """The latent of kv_a is a slice of a wider projection."""
    torch.manual_seed(0)
    wide = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(rms_norm(wide[..., :7], weight, 1e-6).sum(), [wide, weight])
    want = torch.autograd.grad(plain(wide[..., :7], weight, 1e-6).sum(), [wide, weight])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)
