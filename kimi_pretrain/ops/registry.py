"""Which implementation of an operation runs, and why: plain torch, csrc/, or a library.

``kernels=reference`` is plain torch everywhere. ``kernels=native`` insists on csrc/ for every
operation that it has. ``kernels=auto`` takes the first implementation that can run here:
libraries that are installed (CUDA only), then csrc/, then plain torch; ``explain`` says which it
took and what kept the others out. All of them take and give the same. fp64 is plain torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.names import KERNELS
from kimi_pretrain.ops.adapters import apex, transformer_engine
from kimi_pretrain.ops.kernels import OPS, REFERENCE, Kernels, Op
from kimi_pretrain.ops.native import functions, library

NATIVE = "native"
_NARROW = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation that is not plain torch."""

    by: str  # native, transformer_engine, apex
    call: Op
    obstacle: Callable[[str], str | None]  # why it cannot run on a device ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = _NARROW
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: tuple[str, ...] = ()  # where it is no faster than plain torch, and auto leaves it

    def refuses(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve, or None."""
        if dtype not in self.dtypes:
            return f"it takes {' or '.join(map(str, self.dtypes))}"
        return self.obstacle(device)


def _native(call: Op, *needs: str) -> Implementation:
    """A kernel of csrc/ behind which are the library's ops ``needs``."""
    return Implementation(NATIVE, call, lambda device: library.obstacle(needs, device))


def _adapter(module: ModuleType, call: Op, probe: str = "missing") -> Implementation:
    """What an optional library has, bf16 on CUDA; the adapter's ``probe`` says why not."""
    by = module.__name__.rpartition(".")[2]
    return Implementation(
        by, call, lambda _: getattr(module, probe)(), (torch.bfloat16,), ("cuda",)
    )


def _te(call: Op, probe: str = "missing") -> Implementation:
    return _adapter(transformer_engine, call, probe)


# What there is beside plain torch, the first choice first. RMSNorm of csrc/ comes before that of
# Transformer Engine, which rounds the weight's gradient to bf16.
FASTER: dict[str, tuple[Implementation, ...]] = {
    "quantise_tiles": (_native(functions.quantise_tiles, "quantise_tiles"),),
    "dequantise_tiles": (_native(functions.dequantise_tiles, "dequantise_tiles"),),
    "swiglu": (_native(functions.swiglu, "swiglu", "swiglu_backward"),),
    "swiglu_tiles": (_native(functions.swiglu_tiles, "swiglu_tiles"),),
    "swiglu_tiles_backward": (_native(functions.swiglu_tiles_backward, "swiglu_tiles_backward"),),
    "rms_norm": (
        _native(functions.rms_norm, "rms_norm", "rms_norm_backward"),
        _te(transformer_engine.rms_norm),
    ),
    "take_rows": (_native(functions.take_rows, "take_rows", "summed_rows"),),
    "summed_rows": (_native(functions.summed_rows, "summed_rows", "take_rows"),),
    "weighted_rows": (_native(functions.weighted_rows, "weighted_rows", "weighted_rows_backward"),),
    "attention": (_te(transformer_engine.attention, "attention_missing"),),
    # Nearly all of the work is a matrix product, at which the CPU's libraries are as good.
    "max_logits": (replace(_native(functions.max_logits, "max_logits"), slow=("cpu",)),),
    "grouped_linear": (_te(transformer_engine.grouped_linear),),
    "add_product": (_adapter(apex, apex.add_product),),
}


def select(
    op: str,
    kernels: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Op:
    """The function to call for ``op``, a field of ``Kernels``.

    Args:
        op: its name.
        kernels: auto, reference or native.
        device: where its tensors are, "cpu" or "cuda".
        dtype: of its floating-point data.

    Raises:
        ConfigError: an unknown name, or native where the kernel that csrc/ has cannot run.
    """
    return _choose(op, kernels, device, dtype)[0]


def kernels_for(kernels: str, device: str, dtype: torch.dtype) -> Kernels:
    """The operations of a model on ``device`` whose parameters are ``dtype``.

    Raises:
        ConfigError: as for ``select``.
    """
    return Kernels(**{op: select(op, kernels, device, dtype) for op in OPS})


def explain(
    kernels: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """For each op who runs it, and after a colon why nobody better does; as ``select`` chooses."""
    told = {}
    for op in OPS:
        _, by, reasons = _choose(op, kernels, device, dtype)
        told[op] = f"{by}: {'; '.join(reasons)}" if reasons else by
    return told


def summary(kernels: str, device: str, dtype: torch.dtype) -> str:
    """``explain`` in one line, the ops of one answer together."""
    groups: dict[str, list[str]] = {}
    for op, answer in explain(kernels, device, dtype).items():
        groups.setdefault(answer, []).append(op)
    parts = []
    for answer, ops in groups.items():
        by, _, why = answer.partition(": ")
        parts.append(f"{by} {', '.join(ops)}" + (f" ({why})" if why else ""))
    return "; ".join(parts)


def _choose(
    op: str, kernels: str, device: str, dtype: torch.dtype
) -> tuple[Op, str, tuple[str, ...]]:
    """(function, who made it, why nobody better)."""
    if kernels not in KERNELS:
        raise ConfigError("kernels", kernels, f"one of {', '.join(KERNELS)}", "auto")
    if op not in OPS:
        raise ConfigError("op", op, f"one of {', '.join(OPS)}", OPS[0])
    reference: Op = getattr(REFERENCE, op)
    if kernels == "reference":
        return reference, "reference", ("asked for",)
    reasons: list[str] = []
    for known in FASTER[op]:
        if device not in known.devices or (kernels == NATIVE and known.by != NATIVE):
            continue
        obstacle = known.refuses(device, dtype)
        if obstacle is None and kernels == "auto" and device in known.slow:
            obstacle = f"{known.by} is no faster on {device}"
        if obstacle is None:
            return known.call, known.by, tuple(reasons)
        if kernels == NATIVE:
            raise ConfigError(
                "kernels",
                NATIVE,
                f"{op} on {device} in {dtype} has no native kernel: {obstacle}",
                "kernels=auto, or `pip install --no-build-isolation .` where torch and g++ are",
            )
        reasons.append(f"{known.by}: {obstacle}" if known.by != NATIVE else obstacle)
    return reference, "reference", tuple(reasons) or ("there is no other here",)
