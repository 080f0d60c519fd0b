"""SwiGLU's analytic gradient."""

import pytest
import torch
from torch.nn.functional import silu

from kimi_pretrain.ops.swiglu import swiglu


@pytest.mark.parametrize("rows", [0, 1, 5], ids=["no_rows", "one_row", "rows"])
def test_value_and_gradient_equal_autograd(rows: int) -> None:
    """Gate and up exchanged; one row alone, whose halves are contiguous, overwritten in place."""
    torch.manual_seed(0)
    x = torch.randn(rows, 14, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    got, want = swiglu(x), silu(x[..., :7]) * x[..., 7:]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grad = torch.randn(rows, 7, dtype=torch.float64)
    (g,), (w,) = torch.autograd.grad(got, x, grad), torch.autograd.grad(want, x, grad)
    torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-14)
    assert torch.equal(x.detach(), before)
    assert g.is_contiguous()
