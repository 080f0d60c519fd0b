"""NVIDIA Transformer Engine: cuDNN's fused attention, grouped matrix products, RMSNorm.

Its functions, not its modules: modules own their weights and save what they like, while here
weights belong to the model, gradients go to ``main_grad`` and everything that backward needs has a
tag (``ops.saved``). The functions are internal to the library; their calls are written after
release 2.20, and an older one is refused.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.adapters.probe import obstacle
from kimi_pretrain.ops.grouped import GroupLayout, Runs
from kimi_pretrain.ops.main_grad import deferred, deliver, delivered, main_gradient
from kimi_pretrain.ops.saved import named

FLOOR = (2, 20)
# cuDNN from 9.21 on gives the largest logit of rows of several documents.
CUDNN_FLOOR = (9, 21)
_PACKAGE = "transformer_engine"
_TOKENS_FIRST = "thd_thd_thd"  # q, k and v as [tokens, heads, width], documents end to end


@cache
def missing() -> str | None:
    """None, or why it cannot be used."""
    modules = (_PACKAGE, "transformer_engine.pytorch", "transformer_engine_torch")
    why = obstacle(modules, "it is not installed")
    if why is not None:
        return why
    found = version("transformer-engine")
    if tuple(int(part) for part in found.split(".")[:2]) < FLOOR:
        return f"{found} is older than {'.'.join(map(str, FLOOR))}"
    return None


@cache
def attention_missing() -> str | None:
    """As ``missing``, for attention."""
    why = missing()
    if why is not None:
        return why
    found = import_module("transformer_engine.pytorch.utils").get_cudnn_version()
    if tuple(found[:2]) < CUDNN_FLOOR:
        return f"cuDNN {'.'.join(map(str, found))} does not give the largest logit; 9.21 does"
    return None


@cache
def library() -> Any:
    """The functions that are called here; ``missing()`` is None."""
    extensions = import_module("transformer_engine.pytorch.cpp_extensions")
    fused = import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    compiled = import_module("transformer_engine_torch")
    return SimpleNamespace(
        fused_attn_fwd=fused.fused_attn_fwd,
        fused_attn_bwd=fused.fused_attn_bwd,
        backend=fused.FusedAttnBackend["F16_arbitrary_seqlen"],
        general_grouped_gemm=extensions.general_grouped_gemm,
        rmsnorm_fwd=compiled.rmsnorm_fwd,
        rmsnorm_bwd=compiled.rmsnorm_bwd,
        dtypes=import_module("transformer_engine.pytorch.constants").TE_DType,
    )


# ---- attention ----------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``kimi_pretrain.ops.attention.attention``; bf16.

    The second result [batch, heads, length] is one number a head: its largest logit, which the
    library rounds to bf16, rounded up. Like the log-sum-exp it is never below a logit.
    """
    out, bound = _Attention.apply(q, k, v, scale, document_ids)  # type: ignore[no-untyped-call]
    return out, bound


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = q.shape
        ends = document_ends(document_ids, batch, length, q.device)
        out, further, largest = library().fused_attn_fwd(
            is_training=True,
            q=_tokens_first(q),
            k=_tokens_first(k),
            v=_tokens_first(v),
            return_max_logit=True,
            **_call(q, ends, scale),
        )
        # Half a step of bf16 is 2^-9 of a number; a whole one, to be above it in any case.
        bound = largest.float() + largest.float().abs() * 2.0**-8  # [heads]
        named("attn_out", out, ends, *further)
        ctx.save_for_backward(q, k, v, out, ends, *further)
        ctx.scale = scale
        bound = bound.view(1, heads, 1).expand(batch, heads, length)
        ctx.mark_non_differentiable(bound)
        return out.view(batch, length, heads, -1), bound

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, ends, *further = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        found = library().fused_attn_bwd(
            q=_tokens_first(q),
            k=_tokens_first(k),
            v=_tokens_first(v),
            o=out,
            d_o=grads[0].reshape(out.shape),
            aux_ctx_tensors=list(further),
            do_format="thd",
            dqkv_layout=_TOKENS_FIRST,
            deterministic=True,  # a resumed run repeats the run
            **_call(q, ends, ctx.scale),
        )
        by_head = (x.view(batch, length, heads, -1).transpose(1, 2) for x in found[:3])
        return (*(x.contiguous() for x in by_head), None, None)


def _call(q: Tensor, ends: Tensor, scale: float) -> dict[str, Any]:
    """What forward and backward are both told."""
    length = q.shape[2]
    return {
        "max_seqlen_q": length,
        "max_seqlen_kv": length,
        "cu_seqlens_q": ends,
        "cu_seqlens_kv": ends,
        "cu_seqlens_q_padded": ends,
        "cu_seqlens_kv_padded": ends,
        "fake_dtype": q.dtype,
        "fused_attention_backend": library().backend,
        "attn_scale": scale,
        "dropout": 0.0,
        "qkv_layout": _TOKENS_FIRST,
        "o_format": "thd",
        "attn_mask_type": "padding_causal",
    }


def _tokens_first(x: Tensor) -> Tensor:
    """[batch, heads, length, width] to [batch x length, heads, width], contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def document_ends(
    document_ids: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """[documents + 1] int32: where each document of the flattened batch begins, then its end."""
    total = batch * length
    if document_ids is None:
        return torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
    begins = torch.ones(batch, length, dtype=torch.bool, device=device)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([total])]).int()


# ---- grouped products ---------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, layout: GroupLayout) -> Tensor:
    """See ``kimi_pretrain.ops.grouped.grouped_linear``; bf16, weight gradients summed in fp32."""
    return _GroupedLinear.apply(x, weight, layout)  # type: ignore[no-any-return, no-untyped-call]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: GroupLayout) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.runs = weight, layout.runs  # not the layout: its tensor has a tag
        matrices = weight.flatten(1, -2)  # [groups, width_out, width_in]
        result = x.new_empty(x.shape[0], matrices.shape[1])
        groups, sizes = _filled(layout.runs)
        _multiply(
            [matrices[g] for g in groups], torch.split(x, sizes), [result], sizes, layout="TN"
        )
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), weight, runs = ctx.saved_tensors, ctx.weight, ctx.runs
        grad = grads[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            matrices = weight.flatten(1, -2)
            grad_x = torch.empty_like(x)
            groups, sizes = _filled(runs)
            each = [matrices[g] for g in groups]
            _multiply(each, torch.split(grad, sizes), [grad_x], sizes, layout="NN", grad=True)
        if ctx.needs_input_grad[1]:
            add = partial(_add_gradient, weight, grad, x, runs)
            if main_gradient(weight) is None:
                total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                _accumulate(total, grad, x, runs)
                grad_weight = deliver(weight, total)
            elif not deferred(weight, x, add):
                add()
        return grad_x, grad_weight, None


def _add_gradient(weight: Tensor, grad: Tensor, x: Tensor, runs: Runs) -> None:
    main = main_gradient(weight)
    assert main is not None
    _accumulate(main, grad, x, runs)
    delivered(weight)


def _accumulate(total: Tensor, grad: Tensor, x: Tensor, runs: Runs) -> None:
    """Add every group's ``grad.T @ x`` to its part of ``total``, fp32 of the weight's shape."""
    groups, sizes = _filled(runs)
    parts = total.flatten(1, -2)
    each = [parts[g] for g in groups]
    options = {"layout": "NT", "grad": True, "accumulate": True}
    _multiply(torch.split(x, sizes), torch.split(grad, sizes), each, sizes, **options)


def _filled(runs: Runs) -> tuple[list[int], list[int]]:
    """The groups that have rows, and how many, padding included."""
    filled = [(g, run.rows) for run in runs for g in range(run.first, run.last) if run.rows]
    return [group for group, _ in filled], [rows for _, rows in filled]


def _multiply(
    a: Sequence[Tensor], b: Sequence[Tensor], out: list[Tensor], sizes: list[int], **options: Any
) -> None:
    """``out[i] = b[i] @ a[i].T`` (TN), ``b[i] @ a[i]`` (NN) or ``b[i].T @ a[i]`` (NT).

    A single ``out`` holds all results one below the other.
    """
    if sizes:
        library().general_grouped_gemm(
            A=list(a),
            B=list(b),
            out=out,
            quantization_params=[None] * len(sizes),
            out_dtype=out[0].dtype,
            m_splits=sizes,
            single_output=options["layout"] != "NT",
            **options,
        )


# ---- RMSNorm ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``kimi_pretrain.ops.norm.rms_norm``; the weight's gradient is rounded to its dtype."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        te, rows = library(), x.reshape(-1, x.shape[-1])
        # No buffer for the result, no quantizer, its dtype, all multiprocessors, plain weights.
        y: Tensor
        y, _, scale = te.rmsnorm_fwd(rows, weight, eps, None, None, te.dtypes[x.dtype], 0, False)
        named("norm_in", scale)
        ctx.weight = weight
        ctx.save_for_backward(x, scale)
        return y.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, scale), weight = ctx.saved_tensors, ctx.weight
        width = x.shape[-1]
        grad = grads[0].reshape(-1, width).contiguous()
        rows = x.reshape(-1, width)
        grad_x, grad_weight = library().rmsnorm_bwd(grad, rows, scale, weight, 0, False)
        return grad_x.view_as(x), deliver(weight, grad_weight), None
