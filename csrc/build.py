"""How ``setup.py`` builds csrc/ into ``kimi_pretrain/ops/native/_kernels.so``.

One shared object on torch's stable ABI: the CPU kernels always, the CUDA kernels where nvcc is,
also beside a CPU build of torch and without a GPU. It needs torch's headers at build time, taken
from the environment that the package is installed into. Choices by environment variable:

    KIMI_NATIVE=auto|0|1   auto leaves the library out where torch >= 2.13 or a C++ compiler is
                           missing; 1 fails instead; 0 never builds it
    KIMI_CUDA=auto|0|1     the same for the CUDA kernels, and nvcc
    KIMI_CUDA_ARCH=90a     what nvcc compiles for
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent
NAME = "kimi_pretrain.ops.native._kernels"
# The oldest torch whose stable ABI has what the library uses; it loads in every later one.
TORCH_FLOOR = (2, 13)
DEFINES = [f"-DTORCH_TARGET_VERSION=0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"]
# No contraction into fused multiply-adds: results must not depend on the instruction set.
CXX_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fno-strict-aliasing"),
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def wish(name: str) -> str:
    """The environment variable ``name``: auto, 0 or 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}; one of auto, 0, 1; try {name}=auto")
    return value


def extensions() -> list[Extension]:
    """The library as setuptools' extension, or none where it is not to be or cannot be built."""
    asked = wish("KIMI_NATIVE")
    if asked == "0":
        return []
    missing = obstacle()
    if missing and asked == "1":
        raise SystemExit(f"KIMI_NATIVE: got '1'; {missing}; try KIMI_NATIVE=0")
    if missing:
        sys.stderr.write(f"kimi_pretrain: no native kernels: {missing}\n")
        return []
    return [Extension(NAME, [str(p.relative_to(CSRC.parent)) for p in sources("cpu", ".cpp")])]


def sources(folder: str, suffix: str) -> list[Path]:
    """What is compiled, in a fixed order."""
    return sorted((CSRC / folder).glob(f"*{suffix}"))


class BuildKernels(build_ext):
    """Compiles all sources side by side and links them; setuptools knows nothing of nvcc."""

    def get_ext_filename(self, fullname: str) -> str:
        # No CPython tag: torch loads it, Python does not import it.
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch, nvcc = find_torch(), find_nvcc()
        assert torch is not None  # extensions() has looked
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        commands = {
            folder / f"{source.stem}.o": compile_cpu(torch, source, folder / f"{source.stem}.o")
            for source in sources("cpu", ".cpp")
        }
        if nvcc is not None:
            for source in sources("cuda", ".cu"):
                target = folder / f"{source.stem}.cu.o"
                commands[target] = compile_cuda(nvcc, torch, source, target)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands.values()))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        run(link(torch, nvcc, list(commands), library))


def include(torch: dict[str, str]) -> list[str]:
    """Our headers, and torch's as a system's: its warnings are not ours."""
    return [f"-I{CSRC / 'include'}", "-isystem", f"{torch['root']}/include", *DEFINES]


def compile_cpu(torch: dict[str, str], source: Path, target: Path) -> list[str]:
    """The command that makes an object of the CPU's kernels."""
    return [compiler(), *CXX_FLAGS, *include(torch), "-c", str(source), "-o", str(target)]


def compile_cuda(nvcc: Path, torch: dict[str, str], source: Path, target: Path) -> list[str]:
    """The same for CUDA's."""
    arch = os.environ.get("KIMI_CUDA_ARCH", "90a")
    flags = [*NVCC_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", *include(torch)]
    return [str(nvcc), *flags, "-c", str(source), "-o", str(target)]


def link(
    torch: dict[str, str], nvcc: Path | None, objects: Sequence[Path], library: Path
) -> list[str]:
    """The command that makes the library of its objects; with nvcc, CUDA's among them."""
    libraries = [f"-L{torch['root']}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    if nvcc is not None:
        libraries += [f"-L{nvcc.parents[1] / name}" for name in ("lib64", "lib")]
        libraries += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    flags = ["-shared", *map(str, objects), "-s", "-Wl,--as-needed", *libraries]
    return [compiler(), *flags, "-o", str(library)]


def run(command: Sequence[str]) -> None:
    """One compiler; what it says goes through, and its failure ends the build."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def compiler() -> str:
    """The C++ compiler: CXX, as everywhere, or g++."""
    return os.environ.get("CXX") or "g++"


def find_nvcc() -> Path | None:
    """nvcc in its toolkit's folder, or None where the CUDA kernels are not to be built."""
    asked = wish("KIMI_CUDA")
    if asked == "0":
        return None
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    found = str(home) if home.exists() else shutil.which("nvcc")
    if found:
        return _in_toolkit(found)
    if asked == "1":
        raise SystemExit("KIMI_CUDA: got '1'; there is no nvcc; try CUDA_HOME=DIR or KIMI_CUDA=0")
    return None


def _in_toolkit(nvcc: str) -> Path:
    """The nvcc that a wrapper calls: beside it lie the libraries."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    (top,) = {line.split("TOP=", 1)[1] for line in dry.stderr.splitlines() if "$ TOP=" in line}
    return Path(top.strip()).resolve() / "bin" / "nvcc"


def find_torch() -> dict[str, str] | None:
    """Folder and version of the torch that the library will run with, or None.

    pip builds in an environment of its own that hides the installed packages by PYTHONPATH. An
    isolated interpreter (-I) does not read that, so it sees the environment we are installed into.
    """
    program = (
        "import importlib.metadata as m, importlib.util as u, json, os;"
        "s = u.find_spec('torch');"
        "t = s and {'root': os.path.dirname(s.origin), 'version': m.version('torch')};"
        "print(json.dumps(t))"
    )
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] | None = json.loads(done.stdout)
    return found


def obstacle() -> str | None:
    """What stands in the way of building, as a sentence, or None."""
    torch = find_torch()
    floor = ".".join(map(str, TORCH_FLOOR))
    if torch is None:
        return "torch is not installed, and its headers are needed"
    if tuple(int(part) for part in torch["version"].split(".")[:2]) < TORCH_FLOOR:
        return f"torch {torch['version']} is older than {floor}"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler {compiler()!r}"
    return None
