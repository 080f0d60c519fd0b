"""Names of precisions and the dtype of reductions."""

import pytest
import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.ops.precision import accumulate_dtype, resolve


@pytest.mark.parametrize(
    ("name", "dtype", "high"),
    [
        ("bf16", torch.bfloat16, torch.float32),
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_names_and_reductions(name: str, dtype: torch.dtype, high: torch.dtype) -> None:
    """An fp64 parity run with an fp32 sum anywhere is no parity run."""
    assert resolve(name) == dtype
    assert accumulate_dtype(dtype) == high


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_takes_bf16_only_where_it_is_native(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated bf16 products are slower than fp32 ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve("auto") == dtype


def test_an_unknown_precision_is_one_line_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"fp16.*bf16, fp32, fp64"):
        resolve("fp16")
