"""Which floating-point type a run computes in, and which one its reductions use."""

import torch

from kimi_pretrain.config.errors import ConfigError

_BY_NAME = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def resolve(precision: str) -> torch.dtype:
    """The compute dtype of ``Config.precision``.

    ``auto`` is bf16 where this machine multiplies bf16 matrices natively (CUDA from Ampere
    on, AMX, AVX512-BF16), so that a small run rounds as a large one does, and fp32 elsewhere.
    It does not look for the faster one: small models with AVX512-BF16 are faster in fp32.

    Raises:
        ConfigError: an unknown name.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_native_bf16() else torch.float32
    if precision not in _BY_NAME:
        raise ConfigError("precision", precision, f"one of auto, {', '.join(_BY_NAME)}", "auto")
    return _BY_NAME[precision]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions, statistics and the router on data of ``dtype``.

    fp64 for fp64, so that an fp64 run has no lower precision anywhere; fp32 otherwise.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_native_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
