"""The library of csrc/ as installed, and its CUDA source compiled for the CPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kimi_pretrain.ops.native import library

CSRC = Path(__file__).parents[3] / "csrc"
ISAS = {"baseline": 0, "avx2": 1, "avx512": 2}


class Doors:
    """The C functions of csrc/shim/entry.cpp, called with tensors and numbers."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *arguments: torch.Tensor | int | float) -> None:
        getattr(self.library, name)(*map(_plain, arguments))


def _plain(value: torch.Tensor | int | float) -> object:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def compile_doors(csrc: Path, target: Path) -> Doors:
    """g++ alone: the shim needs neither nvcc nor torch's headers."""
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    folders = [f"-I{csrc / name}" for name in ("include", "shim", "cuda", "cpu")]
    entry = str(csrc / "shim" / "entry.cpp")
    subprocess.run(["g++", *flags, *folders, entry, "-o", str(target)], check=True)
    return Doors(target)


@pytest.fixture(scope="session")
def csrc() -> Path:
    return CSRC


@pytest.fixture(scope="session")
def compile_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Doors]:
    """Compiles a copy of csrc/ in which one text of one file is replaced."""
    if shutil.which("g++") is None:
        pytest.skip("the shim needs g++")

    def compile_with(file: str, old: str, new: str) -> Doors:
        folder = tmp_path_factory.mktemp("csrc")
        copy = folder / "csrc"
        shutil.copytree(CSRC, copy)
        text = (copy / file).read_text()
        assert old in text, f"{file} no longer holds {old!r}"
        (copy / file).write_text(text.replace(old, new))
        return compile_doors(copy, folder / "doors.so")

    return compile_with


@pytest.fixture(scope="session")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Doors:
    """The CUDA kernels on the CPU, and the CPU loops of every instruction set."""
    if shutil.which("g++") is None:
        pytest.skip("the shim needs g++")
    return compile_doors(CSRC, tmp_path_factory.mktemp("shim") / "doors.so")


@pytest.fixture(params=["cuda, threads in order", "cuda, permuted", *ISAS])
def backend(request: pytest.FixtureRequest, doors: Doors) -> str:
    """cuda (through the shim) or cpu: the middle of a door's name, with the way chosen."""
    name: str = request.param
    if name in ISAS:
        doors("cpu_isa", ISAS[name])
        return "cpu"
    doors("simt_seed", 0 if name.endswith("order") else 20260)
    return "cuda"


@pytest.fixture(scope="session")
def native() -> None:
    """Skips where the package was installed without its library."""
    why = library.missing()
    if why is not None:
        pytest.skip(f"no native kernels: {why}")
