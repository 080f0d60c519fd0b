"""Reads what nvcc made of a kernel, without a GPU: registers, memory and widths of access."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sass:
    """One kernel for sm_90a: bytes of memory a thread, and how often each instruction occurs."""

    registers: int
    stack: int  # bytes: spills and arrays that are indexed at run time
    local: int
    shared: int
    instructions: Counter[str] = field(default_factory=Counter)

    def widest(self, prefix: str) -> int:
        """Bits of the widest access whose name begins with LDG or STG; 0 without any."""
        names = [n for n in self.instructions if n.startswith(prefix)]
        return max((128 if ".128" in n else 64 if ".64" in n else 32 for n in names), default=0)

    def spills(self) -> int:
        """Loads from and stores to a thread's own memory."""
        found = self.instructions.items()
        return sum(count for n, count in found if n.startswith(("LDL", "STL")))


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm, from the PATH or from NVIDIA's packages in this environment."""
    packaged = Path(sysconfig.get_paths()["purelib"], "nvidia").glob(f"**/bin/{name}")
    return shutil.which(name) or next((str(p) for p in packaged), None)


def read(cubin: Path) -> dict[str, Sass]:
    """Every kernel of ``cubin``, by its C++ name."""
    usage = _output("--dump-resource-usage", cubin)
    kernels = {}
    for mangled, line in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        numbers = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
        keys = ("REG", "STACK", "LOCAL", "SHARED")
        kernels[mangled] = Sass(*(numbers[key] for key in keys))
    current = ""
    for line in _output("-sass", cubin).splitlines():
        if begun := re.search(r"Function : (\S+)", line):
            current = begun[1]
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
            kernels[current].instructions[code[1]] += 1
    demangled = subprocess.run(
        ["c++filt", *kernels], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {_short(name): k for name, k in zip(demangled, kernels.values(), strict=True)}


def _short(name: str) -> str:
    """``void kimi::cuda::f<kimi::bf16, true>(...)`` as ``f<bf16, true>``."""
    return re.sub(r"\w+::", "", name.removeprefix("void ").split("(", 1)[0])


def _output(option: str, cubin: Path) -> str:
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    assert cuobjdump is not None
    assert nvdisasm is not None
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ["PATH"]])  # -sass calls it
    done = subprocess.run(
        [cuobjdump, option, str(cubin)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout
