"""Assembly of queries, keys and values against plain operations."""

import torch

from kimi_pretrain.ops.mla_heads import mla_heads


def test_values_and_gradients_equal_plain_operations() -> None:
    """Rope rows before nope rows, a value taken for a key, the shared key's gradient not summed."""
    torch.manual_seed(0)
    batch, length, heads, nope, rope, v = 2, 5, 3, 4, 6, 7
    q = torch.randn(batch, length, heads, nope + rope, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(batch, length, heads, nope + v, dtype=torch.float64, requires_grad=True)
    k_rope = torch.randn(batch, length, rope, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(length, rope // 2, dtype=torch.float64)

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None, :]
        return torch.view_as_real(turned).flatten(-2)

    want = (
        torch.cat([q[..., :nope], turn(q[..., nope:])], -1),
        torch.cat([kv[..., :nope], turn(k_rope[:, :, None]).expand(-1, -1, heads, -1)], -1),
        kv[..., nope:],
    )
    got = mla_heads(q, kv, k_rope, angle.cos(), angle.sin())
    grads = [torch.randn(g.shape, dtype=torch.float64) for g in got]
    for g, w in zip(got, want, strict=True):
        assert g.is_contiguous()
        torch.testing.assert_close(g, w.transpose(1, 2), rtol=1e-12, atol=1e-14)
    got_grads = torch.autograd.grad(got, [q, kv, k_rope], grads)
    want_grads = torch.autograd.grad(want, [q, kv, k_rope], [g.transpose(1, 2) for g in grads])
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)
