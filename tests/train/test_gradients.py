"""Main gradients: full-precision accumulation, one norm, clipping."""

import torch
from torch import nn

from kimi_pretrain.train.gradients import MainGradients


def _model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)


def test_microbatches_of_bf16_accumulate_in_fp32() -> None:
    """Catches accumulation in the parameter's dtype: 512 bf16 additions of a small gradient
    to a large one lose it entirely."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    gradients = MainGradients([("weight", weight)])
    (weight * 256.0).sum().backward()
    for _ in range(512):
        (weight * 0.25).sum().backward()
    assert gradients.flat.dtype == torch.float32
    assert torch.equal(gradients.flat, torch.full((4,), 256.0 + 512 * 0.25))
    assert weight.grad is None


def test_wide_parameters_accumulate_without_a_copy() -> None:
    """Catches gradients that autograd replaces instead of adding to, after the first step."""
    model = _model(torch.float64)
    gradients = MainGradients(model.named_parameters())
    x = torch.randn(5, 8, dtype=torch.float64)
    for _ in range(2):
        gradients.zero()
        model(x).square().sum().backward()
        once = gradients.flat.clone()
        model(x).square().sum().backward()
        assert torch.equal(gradients.flat, 2 * once)
    assert once.norm() > 0


def test_norm_and_clip_are_global() -> None:
    """Catches a norm by tensor, and clipping that touches gradients below the limit."""
    model = _model(torch.float32)
    gradients = MainGradients(model.named_parameters())
    gradients.flat.fill_(2.0)
    norm = gradients.norm()
    assert float(norm) == 2.0 * gradients.flat.numel() ** 0.5
    gradients.clip(norm, None)
    gradients.clip(norm, float(norm))
    assert float(gradients.flat.max()) == 2.0
    gradients.clip(norm, 1.0)
    assert abs(float(gradients.norm()) - 1.0) < 1e-6


def test_nonfinite_parameters_are_named() -> None:
    """Catches a verdict that says something is wrong but not where."""
    model = _model(torch.float32)
    gradients = MainGradients(model.named_parameters())
    model[1].bias.main_grad[2] = float("nan")
    assert gradients.nonfinite() == ["1.bias"]
