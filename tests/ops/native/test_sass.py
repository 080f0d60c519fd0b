"""What nvcc makes of the kernels for sm_90a, held to a budget without a GPU."""

import importlib.util
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

# Registers a thread may take: 40 lets an SM of 65,536 hold six blocks of 256 threads.
REGISTERS = {"quantise_tiles_kernel": 40, "dequantise_tiles_kernel": 40}
# Kernels that read and write 16 bytes at a time; the other variant of each takes ragged rows.
WIDE = {
    f"{name}<{dtype}, true>"
    for name in ("quantise_tiles_kernel", "dequantise_tiles_kernel")
    for dtype in ("bf16", "float")
}


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
    assert {name.split("<")[0] for name in kernels} == set(REGISTERS)
    for name, kernel in kernels.items():
        assert kernel.registers <= REGISTERS[name.split("<")[0]], f"{name}: {kernel.registers}"
        assert (kernel.stack, kernel.local, kernel.spills()) == (0, 0, 0), name


def test_kernels_bound_by_bandwidth_move_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    """Catches a load or store that the compiler split, which halves or quarters bandwidth."""
    assert set(kernels) >= WIDE
    for name in WIDE:
        assert kernels[name].widest("LDG") == 128, name
        assert kernels[name].widest("STG") == 128, name
