"""Who runs an op: asked for by name, never changed in silence."""

import pytest
import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.ops import fp8_tiles
from kimi_pretrain.ops.native import library
from kimi_pretrain.ops.registry import OPS, explain, select


def test_reference_is_plain_torch() -> None:
    """Catches a kernel that runs although plain torch was asked for."""
    assert select("quantise_tiles", "reference") is fp8_tiles.quantise_tiles
    assert set(explain("reference").values()) == {"reference: asked for"}


def test_an_absent_library_is_said_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that asks for native kernels and gets others without a word."""
    monkeypatch.setattr(library, "missing", lambda: "it was not built")
    with pytest.raises(ConfigError, match=r"quantise_tiles on cpu .*: it was not built; try ") as e:
        select("quantise_tiles", "native")
    assert "\n" not in str(e.value)
    assert select("quantise_tiles", "auto") is fp8_tiles.quantise_tiles
    assert set(explain("auto").values()) == {"reference: it was not built"}


def test_a_dtype_that_no_kernel_takes_stays_with_plain_torch() -> None:
    """Catches an fp64 run that silently loses precision in an fp32 kernel."""
    for op, known in OPS.items():
        assert select(op, "auto", dtype=torch.float64) is known.reference
        with pytest.raises(ConfigError, match=r"it takes torch\.bfloat16 or torch\.float32"):
            select(op, "native", dtype=torch.float64)


def test_unknown_names_are_refused() -> None:
    """Catches a misspelt choice that means auto."""
    with pytest.raises(ConfigError, match="one of auto, reference, native"):
        select("quantise_tiles", "fast")
    with pytest.raises(ConfigError, match="one of quantise_tiles"):
        select("quantize_tiles")


def test_what_was_built_is_used() -> None:
    """Catches a library that is there and is not asked."""
    if library.missing() is not None:
        pytest.skip(f"no native kernels: {library.missing()}")
    assert explain("auto", "cpu", torch.float32) == dict.fromkeys(OPS, "native")
