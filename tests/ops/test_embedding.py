"""The embedding's gradient."""

import torch

from kimi_pretrain.ops.embedding import embedding


def test_gradient_equals_autograd() -> None:
    """A token that appears twice adds both rows."""
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[1, 4, 1], [5, 5, 5]])
    grad = torch.randn(2, 3, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(embedding(tokens, weight), weight, grad)
    (want,) = torch.autograd.grad(weight[tokens], weight, grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_bf16_sum_of_a_frequent_token_does_not_stall() -> None:
    """Adding ones in bf16 stops at 256."""
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    embedding(torch.zeros(4096, dtype=torch.int64), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == 4096.0
