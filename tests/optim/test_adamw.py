import pytest
import torch

from kimi_pretrain.optim.adamw import adamw_


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_many_steps_equal_torch_adamw(dtype: torch.dtype, rtol: float) -> None:
    """Catches a step counter off by one (bias correction) and decay scaled by the moments."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (5, 3), ()]
    mine = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    theirs = [torch.nn.Parameter(w.clone()) for w in mine]
    moments = [[torch.zeros_like(w) for w in mine] for _ in range(2)]
    settings = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    peer = torch.optim.AdamW(theirs, foreach=False, **settings)
    for step in range(1, 8):
        grads = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        peer.step()
        adamw_(mine, grads, *moments, step=step, **settings)  # type: ignore[arg-type]
        for weight, parameter in zip(mine, theirs, strict=True):
            assert torch.allclose(weight, parameter.detach(), rtol=rtol, atol=rtol)


def test_gradients_are_left_as_they_are() -> None:
    """Catches weight decay folded into the gradient, which the metrics read afterwards."""
    weight, grad = torch.ones(4), torch.full((4,), 0.5)
    moments = [torch.zeros(4)], [torch.zeros(4)]
    adamw_(
        [weight], [grad], *moments, step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5
    )
    assert torch.equal(grad, torch.full((4,), 0.5))
    assert not torch.equal(weight, torch.ones(4))


def test_no_parameters_is_no_work() -> None:
    adamw_([], [], [], [], step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
