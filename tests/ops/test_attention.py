"""Blocked attention against whole softmax matrices and against torch's fused kernel."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kimi_pretrain.ops import attention as module
from kimi_pretrain.ops.attention import attention, max_logits, several_documents

SCALE = 0.7


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks of rows and of heads already at a length of 11."""
    monkeypatch.setattr(module, "_MIN_ROWS", 4)
    monkeypatch.setattr(module, "_MAX_ROWS", 4)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 4 * 11 * 3)
    return


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 11, 6), (2, 4, 11, 6), (2, 4, 11, 5)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.to(dtype).requires_grad_() for t in (q, k, v))  # type: ignore[return-value]


DOCUMENTS = torch.tensor([[0] * 3 + [1] * 5 + [2] * 3, [7] * 10 + [8]], dtype=torch.int32)


def logits_of(q: Tensor, k: Tensor, documents: Tensor | None) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None, :])[:, None]
    return (q @ k.transpose(-1, -2) * SCALE).masked_fill(hidden, -torch.inf)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kept", [0, 10**6], ids=["recomputed", "kept"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_output_lse_and_gradients_equal_whole_matrices(
    documents: Tensor | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's edge, a mask of the wrong sequence, or a wrong term of the softmax's backward."""
    monkeypatch.setattr(module, "_KEPT_ELEMENTS", kept)
    q, k, v = inputs()
    out, lse = attention(q, k, v, SCALE, documents)
    logits = logits_of(q, k, documents)
    want = (logits.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(lse, logits.logsumexp(-1).detach(), rtol=1e-12, atol=1e-13)
    grad = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad(out, [q, k, v], grad)
    for g, w in zip(got, torch.autograd.grad(want, [q, k, v], grad), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equals_torchs_fused_kernel(dtype: torch.dtype) -> None:
    """An independent implementation, at more than one block of rows and in every dtype."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 150, 16).to(dtype).requires_grad_() for _ in range(3))
    out, lse = attention(q, k, v, 0.25)
    want, want_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=0.25
    )
    loose = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out, want.transpose(1, 2), rtol=loose, atol=loose)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=2e-4)  # the kernel's exp is rough
    grad = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, [q, k, v], grad)
    wanted = torch.autograd.grad(want.transpose(1, 2), [q, k, v], grad)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=4 * loose, atol=4 * loose)


def test_bf16_logits_near_the_clipping_threshold_are_fp32() -> None:
    """bf16 steps by 0.5 between 64 and 128: QK-Clip could not tell 99.8 from 100.2."""
    q = torch.full((1, 1, 2, 4), 7.0625, dtype=torch.bfloat16)
    k = torch.full((1, 1, 2, 4), 3.53125, dtype=torch.bfloat16)
    exact = 4 * 7.0625 * 3.53125
    _, lse = attention(q, k, k, 1.0)
    assert abs(lse[0, 0, 0].item() - exact) < 1e-4
    assert abs(max_logits(q, k, 1.0, None, torch.tensor([True])).item() - exact) < 1e-4


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_max_logits_are_over_visible_pairs_of_the_chosen_heads(documents: Tensor | None) -> None:
    """Masked pairs or another head's maximum; a maximum that starts at 0 (head 2 is negative)."""
    q, k, v = inputs()
    with torch.no_grad():
        q[:, 2], k[:, 2] = -q[:, 2].abs() - 0.1, k[:, 2].abs() + 0.1
    want = logits_of(q, k, documents).amax(dim=(0, 2, 3)).detach()
    got = max_logits(q, k, SCALE, documents, torch.tensor([False, False, True, True]))
    assert want[2] < 0.0
    torch.testing.assert_close(got[2:], want[2:], rtol=1e-12, atol=0)
    assert got[:2].tolist() == [-torch.inf] * 2
    _, lse = attention(q, k, v, SCALE, documents)
    assert (lse.amax(dim=(0, 2)) >= want).all()


def test_rows_of_one_document_each_need_no_mask() -> None:
    """Different ids in different rows are not a boundary."""
    assert several_documents(torch.tensor([[3, 3, 3], [4, 4, 4]])) is None
    assert several_documents(None) is None
    assert several_documents(DOCUMENTS) is DOCUMENTS


def test_another_document_has_no_influence() -> None:
    """Changing a document must not change what its neighbours compute."""
    q, k, v = inputs()
    before, _ = attention(q, k, v, SCALE, DOCUMENTS)
    with torch.no_grad():
        k[0, :, 3:8] += 5.0
        v[0, :, 3:8] += 5.0
    after, _ = attention(q, k, v, SCALE, DOCUMENTS)
    assert torch.equal(before[0, :3], after[0, :3])
    assert torch.equal(before[0, 8:], after[0, 8:])
    assert not torch.equal(before[0, 3:8], after[0, 3:8])


def test_no_large_square_of_the_length_is_saved() -> None:
    """At 131,072 tokens one head's logits would take 68 GB."""
    q, k, v = (torch.randn(1, 12, 1280, 4, requires_grad=True) for _ in range(3))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention(q, k, v, 1.0)
    assert max(saved) <= q.numel()
