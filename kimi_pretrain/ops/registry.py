"""Which implementation of an op runs: plain torch (reference), or a kernel of csrc/ (native).

``kernels=reference`` is plain torch everywhere and ``kernels=native`` insists on csrc/;
``kernels=auto`` takes native where the library has the op for the device and dtype, reference
elsewhere, and ``explain`` says which it took and why. Both sides take and give the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.ops import attention, fp8_tiles, norm, permute, swiglu
from kimi_pretrain.ops.native import functions, library

CHOICES = ("auto", "reference", "native")
Op = Callable[..., Any]


@dataclass(frozen=True)
class Implementations:
    """One op: its plain definition, its fused kernel, and the dtypes that the kernel takes."""

    reference: Op
    native: Op
    needs: tuple[str, ...]  # the library's ops behind `native`
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


OPS = {
    "quantise_tiles": Implementations(
        fp8_tiles.quantise_tiles, functions.quantise_tiles, ("quantise_tiles",)
    ),
    "dequantise_tiles": Implementations(
        fp8_tiles.dequantise_tiles, functions.dequantise_tiles, ("dequantise_tiles",)
    ),
    "swiglu": Implementations(swiglu.swiglu, functions.swiglu, ("swiglu", "swiglu_backward")),
    "swiglu_tiles": Implementations(swiglu.swiglu_tiles, functions.swiglu_tiles, ("swiglu_tiles",)),
    "swiglu_tiles_backward": Implementations(
        swiglu.swiglu_tiles_backward, functions.swiglu_tiles_backward, ("swiglu_tiles_backward",)
    ),
    "rms_norm": Implementations(
        norm.rms_norm, functions.rms_norm, ("rms_norm", "rms_norm_backward")
    ),
    "take_rows": Implementations(
        permute.take_rows, functions.take_rows, ("take_rows", "summed_rows")
    ),
    "summed_rows": Implementations(
        permute.summed_rows, functions.summed_rows, ("summed_rows", "take_rows")
    ),
    "weighted_rows": Implementations(
        permute.weighted_rows, functions.weighted_rows, ("weighted_rows", "weighted_rows_backward")
    ),
    "max_logits": Implementations(attention.max_logits, functions.max_logits, ("max_logits",)),
}


def select(
    op: str,
    kernels: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Op:
    """The function to call for ``op``, one of ``OPS``.

    Args:
        op: its name.
        kernels: auto, reference or native.
        device: where its tensors are, "cpu" or "cuda".
        dtype: of its floating-point data.

    Raises:
        ConfigError: an unknown name, or native where there is no such kernel.
    """
    if kernels not in CHOICES:
        raise ConfigError("kernels", kernels, f"one of {', '.join(CHOICES)}", "auto")
    if op not in OPS:
        raise ConfigError("op", op, f"one of {', '.join(OPS)}", next(iter(OPS)))
    known = OPS[op]
    obstacle = None if kernels == "reference" else _obstacle(op, device, dtype)
    if kernels == "native" and obstacle is not None:
        raise ConfigError(
            "kernels",
            "native",
            f"{op} on {device} in {dtype} has no native kernel: {obstacle}",
            "kernels=auto, or `pip install --no-build-isolation .` where torch and g++ are",
        )
    return known.native if kernels != "reference" and obstacle is None else known.reference


def explain(
    kernels: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """For each op "native", or "reference" and why; the same choice as ``select``."""
    told = {}
    for op, known in OPS.items():
        if select(op, kernels, device, dtype) is known.native:
            told[op] = "native"
        else:
            why = "asked for" if kernels == "reference" else _obstacle(op, device, dtype)
            told[op] = f"reference: {why}"
    return told


def _obstacle(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the native kernel cannot serve, or None."""
    known = OPS[op]
    if dtype not in known.dtypes:
        return f"it takes {' or '.join(str(d) for d in known.dtypes)}"
    missing = library.missing()
    if missing is not None:
        return missing
    absent = [name for name in known.needs if not library.has_kernel(name, device)]
    return f"the library was built without it for {device}" if absent else None
