"""Who runs an op: asked for by name, never changed in silence."""

import pytest
import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.ops import attention, fp8_tiles
from kimi_pretrain.ops.adapters import transformer_engine
from kimi_pretrain.ops.kernels import OPS, REFERENCE, Kernels
from kimi_pretrain.ops.native import library
from kimi_pretrain.ops.registry import FASTER, explain, kernels_for, select, summary

IN_CSRC = [op for op, known in FASTER.items() if any(one.by == "native" for one in known)]
ELSEWHERE = ["attention", "grouped_linear", "add_product"]


def test_every_op_says_who_else_could_run_it() -> None:
    """Catches an op that is left out, and is then plain torch for ever."""
    assert set(FASTER) == set(OPS)
    assert set(IN_CSRC) == set(OPS) - set(ELSEWHERE)


def test_reference_is_plain_torch() -> None:
    """Catches a kernel that runs although plain torch was asked for."""
    assert select("quantise_tiles", "reference") is fp8_tiles.quantise_tiles
    assert kernels_for("reference", "cuda", torch.bfloat16) == REFERENCE
    assert set(explain("reference").values()) == {"reference: asked for"}


def test_an_absent_library_is_said_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that asks for native kernels and gets others without a word."""
    monkeypatch.setattr(library, "missing", lambda: "it was not built")
    with pytest.raises(ConfigError, match=r"quantise_tiles on cpu .*: it was not built; try ") as e:
        select("quantise_tiles", "native")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="it was not built"):
        kernels_for("native", "cpu", torch.bfloat16)
    assert kernels_for("auto", "cpu", torch.bfloat16) == REFERENCE
    told = explain("auto")
    assert {told[op] for op in IN_CSRC} == {"reference: it was not built"}
    assert {told[op] for op in ELSEWHERE} == {"reference: there is no other here"}


def test_a_dtype_that_no_kernel_takes_stays_with_plain_torch() -> None:
    """Catches an fp64 run that silently loses precision in an fp32 kernel."""
    assert kernels_for("auto", "cuda", torch.float64) == REFERENCE
    for op in IN_CSRC:
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
    told = explain("auto", "cpu", torch.float32)
    assert told.pop("max_logits") == "reference: native is no faster on cpu"
    assert {told[op] for op in IN_CSRC if op in told} == {"native"}
    insisted = kernels_for("native", "cpu", torch.float32)
    assert insisted.max_logits is not attention.max_logits


def test_on_a_gpu_libraries_come_where_csrc_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an installed library that is passed over, one that is asked for on a CPU or in
    fp32, and one that replaces csrc/ where kernels=native insists on it."""
    monkeypatch.setattr(library, "obstacle", lambda ops, device: None)
    monkeypatch.setattr(transformer_engine, "missing", lambda: None)
    monkeypatch.setattr(transformer_engine, "attention_missing", lambda: "cuDNN 9.10 is older")
    told = explain("auto", "cuda", torch.bfloat16)
    assert told["grouped_linear"] == "transformer_engine"
    assert told["attention"] == "reference: transformer_engine: cuDNN 9.10 is older"
    assert told["rms_norm"] == "native"
    assert told["add_product"].startswith("reference: apex: it is not installed")
    assert select("grouped_linear", "auto", "cuda") is transformer_engine.grouped_linear
    assert select("attention", "auto", "cuda") is attention.attention
    for kernels, device, dtype in (
        ("auto", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.float32),
        ("native", "cuda", torch.bfloat16),
    ):
        assert select("grouped_linear", kernels, device, dtype) is REFERENCE.grouped_linear


def test_the_summary_names_every_op_once() -> None:
    """Catches an op that the console's line leaves out."""
    line = summary("reference", "cpu", torch.bfloat16)
    assert line == f"reference {', '.join(OPS)} (asked for)"
    assert isinstance(kernels_for("auto", "cpu", torch.float32), Kernels)
