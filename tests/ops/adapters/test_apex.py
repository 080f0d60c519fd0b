"""The call of apex's fused weight gradient, held against plain torch through a stand-in."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kimi_pretrain.ops.adapters import apex
from kimi_pretrain.ops.grouped import group_layout, grouped_linear
from kimi_pretrain.ops.main_grad import deliver_product


def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main: Tensor) -> None:
    """As fused_weight_gradient_mlp_cuda's: bf16 products summed into fp32."""
    assert x.dtype == grad.dtype == torch.bfloat16
    assert main.dtype == torch.float32
    assert all(t.is_contiguous() for t in (x, grad, main))
    main += grad.float().t() @ x.float()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    monkeypatch.setitem(sys.modules, apex.MODULE, module)


def weight_of(*shape: int) -> Tensor:
    weight = torch.randn(shape).bfloat16().requires_grad_()
    weight.main_grad = torch.ones(shape)  # type: ignore[attr-defined]
    weight.main_grad_adder = apex.add_product  # type: ignore[attr-defined]
    return weight


def test_a_dense_weight() -> None:
    """Catches gradient and input exchanged, and a sum that is overwritten."""
    torch.manual_seed(0)
    weight, x = weight_of(2, 3, 6), torch.randn(7, 6).bfloat16()
    grad = torch.randn(6, 7).bfloat16().t()  # not dense
    assert deliver_product(weight, grad, x) is None
    want = 1 + (grad.double().t() @ x.double()).view(2, 3, 6)
    torch.testing.assert_close(weight.main_grad.double(), want, rtol=1e-5, atol=1e-5)


def test_grouped_weights() -> None:
    """Catches a group's product in another's sum, with an empty group between."""
    torch.manual_seed(0)
    sizes = [3, 0, 2]
    weight, x = weight_of(3, 4, 6), torch.randn(5, 6).bfloat16()
    layout = group_layout(sizes, 1e9, torch.bfloat16)
    assert layout.position is None
    grad = torch.randn(5, 4).bfloat16()
    grouped_linear(x, weight, layout).backward(grad)
    want = torch.ones(3, 4, 6, dtype=torch.float64)
    for group, rows in ((0, slice(0, 3)), (2, slice(3, 5))):
        want[group] += grad[rows].double().t() @ x[rows].double()
    torch.testing.assert_close(weight.main_grad.double(), want, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def test_products_of_fp32_stay_with_plain_torch() -> None:
    """Catches a router's gradient rounded on the way into a product of bf16."""
    torch.manual_seed(0)
    weight = weight_of(3, 6)
    x, grad = torch.randn(7, 6), torch.randn(7, 3)
    deliver_product(weight, grad, x)
    torch.testing.assert_close(weight.main_grad, 1 + grad.t() @ x)
