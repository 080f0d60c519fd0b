"""The calls of Transformer Engine held against plain torch, through stand-ins of its functions.

The stand-ins take the arguments of release 2.20 by their names and do the same in plain torch.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.ops import attention as plain_attention
from kimi_pretrain.ops import grouped, norm
from kimi_pretrain.ops.adapters import transformer_engine as te

SCALE = 0.6
BF16 = torch.bfloat16


def _documents(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> tuple[Tensor, Any]:
    """Attention of documents laid end to end [tokens, heads, width], fp64; the largest logit."""
    largest, parts = torch.full((q.shape[1],), -torch.inf), []
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        a, b, c = (x[first:last].double().transpose(0, 1) for x in (q, k, v))
        hidden = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
        logits = (a @ b.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        largest = torch.maximum(largest, logits.amax(dim=(1, 2)).float().detach())
        parts.append((logits.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(parts), largest


def fused_attn_fwd(
    is_training: bool, max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, fake_dtype: torch.dtype,
    fused_attention_backend: str, cu_seqlens_q_padded: Tensor, cu_seqlens_kv_padded: Tensor,
    attn_scale: float, dropout: float, qkv_layout: str, o_format: str, attn_mask_type: str,
    return_max_logit: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    assert (is_training, return_max_logit, dropout, fake_dtype) == (True, True, 0.0, q.dtype)
    assert (qkv_layout, o_format, attn_mask_type) == ("thd_thd_thd", "thd", "padding_causal")
    assert cu_seqlens_q.dtype == torch.int32
    assert int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()) <= max_seqlen_q
    assert all(x.is_contiguous() for x in (q, k, v))
    out, largest = _documents(q, k, v, cu_seqlens_q, attn_scale)
    stats, state = torch.zeros(len(q), q.shape[1], 1), torch.zeros(2, dtype=torch.int64)
    return out.to(v.dtype), [stats, state], largest.to(v.dtype)


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor,
    k: Tensor, v: Tensor, o: Tensor, d_o: Tensor, fake_dtype: torch.dtype,
    aux_ctx_tensors: list[Tensor], fused_attention_backend: str, cu_seqlens_q_padded: Tensor,
    cu_seqlens_kv_padded: Tensor, attn_scale: float, dropout: float, qkv_layout: str,
    o_format: str, do_format: str, dqkv_layout: str, attn_mask_type: str, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert deterministic
    assert len(aux_ctx_tensors) == 2
    assert o.shape == d_o.shape == v.shape
    assert (do_format, dqkv_layout) == ("thd", qkv_layout)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out, _ = _documents(*leaves, cu_seqlens_q, attn_scale)
    return (*torch.autograd.grad(out, leaves, d_o.double()), None)


def general_grouped_gemm(
    A: list[Tensor], B: list[Tensor], out: list[Tensor], quantization_params: list[None],
    out_dtype: torch.dtype, layout: str = "TN", m_splits: list[int] | None = None,
    grad: bool = False, accumulate: bool = False, single_output: bool = False,
) -> None:  # fmt: skip
    assert len(A) == len(B) == len(quantization_params) == len(m_splits or [])
    assert all(len(b) == size for b, size in zip(B, m_splits or [], strict=True))
    assert grad == (layout != "TN")
    products = []
    for a, b in zip(A, B, strict=True):
        a, b = a.float(), b.float()
        products.append(b @ a.t() if layout == "TN" else b @ a if layout == "NN" else b.t() @ a)
    if single_output:
        out[0].copy_(torch.cat(products))
        return
    for target, product in zip(out, products, strict=True):
        target.copy_(target + product if accumulate else product)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: None, quantizer: None, dtype: str, margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    assert (x.ndim, dtype, margin, zero_centered) == (2, "te-bf16", 0, False)
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * scale[:, None] * weight.float()).to(x.dtype), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    n, g = x.double() * scale[:, None], grad.double()
    wide = g * weight.double()
    grad_x = scale[:, None] * (wide - n * (wide * n).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (g * n).sum(0).to(weight.dtype)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(
        fused_attn_fwd=fused_attn_fwd,
        fused_attn_bwd=fused_attn_bwd,
        backend="arbitrary length",
        general_grouped_gemm=general_grouped_gemm,
        rmsnorm_fwd=rmsnorm_fwd,
        rmsnorm_bwd=rmsnorm_bwd,
        dtypes={BF16: "te-bf16"},
    )
    monkeypatch.setattr(te, "library", lambda: functions)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=random).to(BF16).requires_grad_() for s in shapes]


DOCUMENTS = torch.tensor([[0] * 3 + [1] * 5 + [2] * 3, [2] * 10 + [8]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_attention(documents: Tensor | None) -> None:
    """Catches heads and tokens exchanged, a document that runs on into the next row (both rows
    have a document 2), a bound below a logit, and saved tensors without a tag."""
    q, k, v = leaves((2, 4, 11, 6), (2, 4, 11, 6), (2, 4, 11, 5))
    saved = Saved(Activations.kept())
    with saved.watching():
        for x in (q, k, v):
            saved.named("mla_up", x)
        out, bound = te.attention(q, k, v, SCALE, documents)
    want, _ = plain_attention.attention(q, k, v, SCALE, documents)
    assert out.shape == want.shape
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    grad = torch.randn(out.shape).to(BF16)
    for mine, theirs in zip(
        torch.autograd.grad(out, [q, k, v], grad),
        torch.autograd.grad(want, [q, k, v], grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2)
    everyone = torch.ones(4, dtype=torch.bool)
    exact = plain_attention.max_logits(q, k, SCALE, documents, everyone)
    assert bound.shape == (2, 4, 11)
    largest = bound.amax(dim=(0, 2))
    assert (largest >= exact).all()
    assert (largest <= exact + exact.abs() * 2.0**-7).all()


def test_ends_of_documents() -> None:
    """Catches the end of a row that does not end its document."""
    cpu = torch.device("cpu")
    assert te.document_ends(None, 2, 11, cpu).tolist() == [0, 11, 22]
    assert te.document_ends(DOCUMENTS, 2, 11, cpu).tolist() == [0, 3, 8, 11, 21, 22]


@pytest.mark.parametrize("main", [False, True], ids=["autograd", "main_grad"])
def test_grouped_products(main: bool) -> None:
    """Catches a group's rows with another's weight, an empty group, and a main gradient that is
    overwritten or rounded."""
    sizes = [3, 0, 8, 2]
    x, weight = leaves((13, 6), (4, 2, 5, 6))
    layout = grouped.group_layout(sizes, 1.0, BF16)  # calls are dear: groups are padded
    assert layout.position is not None
    results = []
    for linear in (te.grouped_linear, grouped.grouped_linear):
        own = weight.detach().clone().requires_grad_()
        if main:
            own.main_grad = torch.ones(own.shape)  # type: ignore[attr-defined]
        padded = grouped.pad_rows(x, layout)
        y = grouped.unpad_rows(linear(padded, own, layout), layout)
        (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        if main:
            own.main_grad.fill_(1.0)
        y.backward(torch.ones_like(y))
        results.append((y, grad_x, own.main_grad if main else own.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_rms_norm() -> None:
    """Catches arguments in another order and a weight's gradient that is lost."""
    x, weight = leaves((3, 4, 16), (16,))
    weight.main_grad = torch.zeros(16)  # type: ignore[attr-defined]
    grad = torch.randn(3, 4, 16).to(BF16)
    te.rms_norm(x, weight, 1e-5).backward(grad)
    plain, of_plain = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    want = norm.rms_norm(plain, of_plain, 1e-5)
    want.backward(grad)
    torch.testing.assert_close(te.rms_norm(x, weight, 1e-5), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad, plain.grad, rtol=2e-2, atol=2e-2)
    assert of_plain.grad is not None
    torch.testing.assert_close(weight.main_grad, of_plain.grad.float(), rtol=2e-2, atol=2e-2)


def test_an_older_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches calls of functions whose arguments were others."""
    monkeypatch.setattr(te, "obstacle", lambda modules, absent: None)
    te.missing.cache_clear()
    for release, told in (("2.9.1", "2.9.1 is older than 2.20"), ("2.20.2", None)):
        monkeypatch.setattr(te, "version", lambda name, release=release: release)
        assert te.missing() == told
        te.missing.cache_clear()
