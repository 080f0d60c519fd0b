"""What nvcc makes of the kernels for sm_90a, held to a budget without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from csrc import build


def _reader() -> ModuleType:
    """sass.py beside this file; tests are no package."""
    spec = importlib.util.spec_from_file_location("sass", Path(__file__).with_name("sass.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


sass = _reader()
Moves = sass.Moves

# Registers a thread may take, of the 65,536 of a multiprocessor: with blocks of 256 threads, 40
# let six run on it, 48 five, 64 four. The first name that fits a kernel counts.
REGISTERS = {
    "swiglu_backward_kernel<TileRows, float, 16>": 96,  # tiles with fp32 gradients: tests only
    "swiglu_backward_kernel": 64,
    "swiglu_kernel": 48,
    "rms_norm_backward_kernel": 64,
    "rms_norm_kernel": 40,
    "column_sums_kernel": 40,
    "take_rows_kernel": 40,
    "weighted_rows_backward_kernel": 48,
    "weighted_rows_kernel": 48,
    "max_logits_kernel": 80,  # bound by arithmetic: 16 sums a thread, three blocks at once
    "largest_logits_kernel": 40,
    "dequantise_tiles_kernel": 40,
    "quantise_tiles_kernel": 40,
}
# Of each, the variant that moves 16 bytes at a time; the others take ragged or unaligned rows.
WIDE = r"tiles_kernel<\w+, true>|(swiglu|norm|rows|sums)(_backward)?_kernel<.*\b(4|8|16)(, \w+)?>"
SCALE, SCALES, INDEX = {32: 1}, {32: 2}, {64: 1}
WEIGHT_AND_INDEX = {32: 1, 64: 1}
# What each of those loads and stores.
MOVES = {
    "quantise_tiles_kernel<bf16, true>": (Moves(2), Moves(1, SCALE)),
    "quantise_tiles_kernel<float, true>": (Moves(4), Moves(1, SCALE)),
    "dequantise_tiles_kernel<bf16, true>": (Moves(1, SCALE), Moves(2)),
    "dequantise_tiles_kernel<float, true>": (Moves(1, SCALE), Moves(4)),
    "swiglu_kernel<DenseRows<bf16>, bf16, 8>": (Moves(2), Moves(1)),
    "swiglu_kernel<DenseRows<float>, float, 4>": (Moves(2), Moves(1)),
    "swiglu_kernel<TileRows, bf16, 16>": (Moves(2, SCALES), Moves(2)),
    "swiglu_kernel<TileRows, float, 16>": (Moves(2, SCALES), Moves(4)),
    "swiglu_backward_kernel<DenseRows<bf16>, bf16, 8>": (Moves(3), Moves(2)),
    "swiglu_backward_kernel<DenseRows<float>, float, 4>": (Moves(3), Moves(2)),
    "swiglu_backward_kernel<TileRows, bf16, 16>": (Moves(4, SCALES), Moves(4)),
    "swiglu_backward_kernel<TileRows, float, 16>": (Moves(6, SCALES), Moves(8)),
    "rms_norm_kernel<bf16, 8>": (Moves(3), Moves(1, SCALE)),
    "rms_norm_kernel<float, 4>": (Moves(3), Moves(1, SCALE)),
    "rms_norm_backward_kernel<bf16, 8, true>": (Moves(6, SCALE), Moves(3)),
    "rms_norm_backward_kernel<float, 4, true>": (Moves(6, SCALE), Moves(2)),
    "rms_norm_backward_kernel<bf16, 8, false>": (Moves(8, SCALE), Moves(5)),
    "rms_norm_backward_kernel<float, 4, false>": (Moves(7, SCALE), Moves(3)),
    "column_sums_kernel<4>": (Moves(1), Moves(1)),
    "take_rows_kernel<bf16, 8>": (Moves(1, INDEX), Moves(1)),
    "take_rows_kernel<float, 4>": (Moves(1, INDEX), Moves(1)),
    "weighted_rows_kernel<bf16, 8>": (Moves(1, WEIGHT_AND_INDEX, a_pack=True), Moves(1)),
    "weighted_rows_kernel<float, 4>": (Moves(1, WEIGHT_AND_INDEX, a_pack=True), Moves(1)),
    "weighted_rows_backward_kernel<bf16, 8>": (Moves(2, WEIGHT_AND_INDEX), Moves(1, SCALE)),
    "weighted_rows_backward_kernel<float, 4>": (Moves(2, WEIGHT_AND_INDEX), Moves(1, SCALE)),
}


def absent() -> list[str]:
    """The tools that are not here."""
    nvcc = build.find_nvcc()
    readers = [name for name in ("cuobjdump", "nvdisasm") if sass.tool(name) is None]
    return [*([] if nvcc else ["nvcc"]), *readers]


def may_be_left_out(missing: list[str], environ: Mapping[str, str]) -> bool:
    """Only where nobody builds CUDA kernels: without nvcc, and not in continuous integration."""
    return "nvcc" in missing and environ.get("KIMI_CI", "0") != "1"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The object that nvcc makes; what is for the host is not optimised, to save time."""
    missing = absent()
    if missing and may_be_left_out(missing, os.environ):
        pytest.skip(f"no {', '.join(missing)} here")
    readers = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    assert not missing, f"no {', '.join(missing)} here: CUDA's toolkit, `pip install {readers}`"
    torch, nvcc = build.find_torch(), build.find_nvcc()
    assert torch is not None
    assert nvcc is not None
    target = tmp_path_factory.mktemp("sass") / "ops.cu.o"
    (source,) = build.sources("cuda", ".cu")
    build.run([*build.compile_cuda(nvcc, torch, source, target), "-Xcompiler", "-O0"])
    return target


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> dict[str, Any]:
    found: dict[str, Any] = sass.read(compiled)
    return found


def test_every_kernel_has_a_budget_and_keeps_it(kernels: dict[str, Any]) -> None:
    """Catches registers spilled to memory, arrays that became local memory, and a new kernel
    without a budget."""
    for name, kernel in kernels.items():
        budgets = [most for known, most in REGISTERS.items() if name.startswith(known)]
        assert budgets, f"{name} has no budget"
        assert kernel.registers <= budgets[0], f"{name}: {kernel.registers} registers"
        assert (kernel.stack, kernel.local, kernel.spills()) == (0, 0, 0), name


def test_kernels_bound_by_bandwidth_move_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    """Catches a load or store that the compiler split, which halves or quarters bandwidth, and a
    new kernel of which nobody said what it moves."""
    assert {name for name in kernels if re.search(WIDE, name)} == set(MOVES)
    for name, (loads, stores) in MOVES.items():
        assert loads.complaints(kernels[name].widths("LD")) == [], f"{name} loads"
        assert stores.complaints(kernels[name].widths("ST")) == [], f"{name} stores"


def test_a_cpu_build_of_torch_loads_the_cuda_kernels(compiled: Path, tmp_path: Path) -> None:
    """Catches a library that does not link without torch's CUDA libraries, or that drops its
    CUDA kernels where it is loaded by a torch without CUDA."""
    torch = build.find_torch()
    nvcc = build.find_nvcc()
    assert torch is not None
    assert nvcc is not None
    host, library = tmp_path / "ops.o", tmp_path / "kernels.so"
    (source,) = build.sources("cpu", ".cpp")
    build.run([*build.compile_cpu(torch, source, host), "-O0"])
    build.run(build.link(torch, nvcc, [host, compiled], library))
    program = (
        "import torch;"
        f"torch.ops.load_library({str(library)!r});"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n[:14] == 'kimi_pretrain:'];"
        "print(bool(names), [n for n in names if not (has(n, 'CPU') and has(n, 'CUDA'))])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "True []\n", done.stderr


def test_one_wide_load_does_not_hide_a_split_one() -> None:
    """Catches a gate that looks at the widest access only, and one that lets four words of 32
    bits pass as scalars."""
    kernel = sass.Sass(32, 0, 0, 0)
    loads = Moves(2, SCALE)
    kernel.instructions = Counter({"LDG.E.128.CONSTANT": 2, "LDG.E.CONSTANT": 1, "LDS.128": 9})
    assert loads.complaints(kernel.widths("LD")) == []
    kernel.instructions["LDG.E.64.CONSTANT"] = 2
    assert loads.complaints(kernel.widths("LD")) == ["2 of 64 bits instead of 0 at most"]
    kernel.instructions = Counter({"LDG.E.128": 1, "LD.E": 5, "LDG.E.U16": 1})
    assert loads.complaints(kernel.widths("LD")) == [
        "1 of 128 bits instead of 2 at least",
        "1 of 16 bits instead of 0 at most",
        "5 of 32 bits instead of 1 at most",
    ]
    each = Moves(1, WEIGHT_AND_INDEX, a_pack=True)
    assert each.complaints(Counter({128: 3, 64: 3, 32: 2})) == []
    assert each.complaints(Counter({128: 3, 64: 5, 32: 2})) == ["5 of 64 bits instead of 3 at most"]


def test_the_gate_is_left_out_only_where_no_cuda_is_built() -> None:
    """Catches a gate that is skipped in continuous integration, or beside an nvcc that builds
    kernels which nobody then reads."""
    assert may_be_left_out(["nvcc", "cuobjdump"], {})
    assert may_be_left_out(["nvcc"], {"KIMI_CI": "0"})
    assert not may_be_left_out(["nvcc"], {"KIMI_CI": "1"})
    assert not may_be_left_out(["cuobjdump", "nvdisasm"], {})
