"""What nvcc makes of the kernels for sm_90a, held to a budget without a GPU."""

import importlib.util
import re
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
    spec.loader.exec_module(module)
    return module


sass = _reader()
ABSENT = [
    name
    for name, found in (
        ("nvcc", build.find_nvcc()),
        ("cuobjdump", sass.tool("cuobjdump")),
        ("nvdisasm", sass.tool("nvdisasm")),
    )
    if found is None
]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"no {', '.join(ABSENT)} here")

# Registers a thread may take, of the 65,536 of a multiprocessor: with blocks of 256 threads, 40
# let six run on it, 48 five, 64 four. The first name that fits a kernel counts.
REGISTERS = {
    "swiglu_backward_kernel<TileRows, float, 16>": 96,  # tiles with fp32 gradients: tests only
    "swiglu_backward_kernel": 64,
    "swiglu_kernel": 48,
    "rms_norm_backward_kernel": 64,
    "rms_norm_kernel": 40,
    "column_sums_kernel": 32,
    "take_rows_kernel": 40,
    "weighted_rows_backward_kernel": 48,
    "weighted_rows_kernel": 48,
    "max_logits_kernel": 80,  # bound by arithmetic: 16 sums a thread, three blocks at once
    "largest_logits_kernel": 40,
    "dequantise_tiles_kernel": 40,
    "quantise_tiles_kernel": 40,
}
# Of each, the variant that moves 16 bytes at a time; the others take ragged or unaligned rows.
WIDE = r"tiles_kernel<\w+, true>|(swiglu|norm|rows)(_backward)?_kernel<.*, (4|8|16)>"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch, nvcc = build.find_torch(), build.find_nvcc()
    assert torch is not None
    assert nvcc is not None
    cubin = tmp_path_factory.mktemp("sass") / "ops.cubin"
    (source,) = build.sources("cuda", ".cu")
    build.run(build.compile_cuda(nvcc, torch, source, cubin, "-cubin"))
    found: dict[str, Any] = sass.read(cubin)
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
    """Catches a load or store that the compiler split, which halves or quarters bandwidth."""
    wide = [name for name in kernels if re.search(WIDE, name)]
    assert len(wide) == 4 + 4 + 4 + 4 + 6  # FP8 tiles, SwiGLU dense and of tiles, norm, permute
    for name in wide:
        assert kernels[name].widest("LDG") == 128, name
        assert kernels[name].widest("STG") == 128, name
