"""Reads what nvcc made of a kernel, without a GPU: registers, memory and widths of access."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}  # bits, from a name's parts


@dataclass
class Sass:
    """One kernel for sm_90a: bytes of memory a thread, and how often each instruction occurs."""

    registers: int
    stack: int  # bytes: spills and arrays that are indexed at run time
    local: int
    shared: int
    instructions: Counter[str] = field(default_factory=Counter)

    def widths(self, kind: str) -> Counter[int]:
        """Bits -> how many loads (LD) or stores (ST) of global memory are so wide."""
        found: Counter[int] = Counter()
        for name, count in self.instructions.items():
            base, *rest = name.split(".")
            if base in (kind, f"{kind}G"):  # generic where nvcc does not know the space
                found[next((WIDTHS[part] for part in rest if part in WIDTHS), 32)] += count
        return found

    def spills(self) -> int:
        """Loads from and stores to a thread's own memory."""
        found = self.instructions.items()
        return sum(count for n, count in found if n.startswith(("LDL", "STL")))


@dataclass(frozen=True)
class Moves:
    """What a kernel moves at a time: packs of 16 bytes, and the scalars beside them by width."""

    packs: int  # in one pass of its loops; nvcc unrolls them to more
    scalars: dict[int, int] = field(default_factory=dict)  # bits -> how many at most
    a_pack: bool = False  # the scalars are those of each pack, and are unrolled with it

    def complaints(self, found: Counter[int]) -> list[str]:
        """What of the accesses that were found is narrower than it should be."""
        wide = found[128]
        times = wide if self.a_pack else 1
        few = [] if wide >= self.packs else [f"{wide} of 128 bits instead of {self.packs} at least"]
        return few + [
            f"{count} of {bits} bits instead of {times * self.scalars.get(bits, 0)} at most"
            for bits, count in sorted(found.items())
            if bits != 128 and count > times * self.scalars.get(bits, 0)
        ]


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm, from the PATH or from NVIDIA's packages in this environment."""
    packaged = Path(sysconfig.get_paths()["purelib"], "nvidia").glob(f"**/bin/{name}")
    return shutil.which(name) or next((str(p) for p in packaged), None)


def read(compiled: Path) -> dict[str, Sass]:
    """Every kernel of a cubin or of an object that holds one, by its C++ name."""
    usage = _output("--dump-resource-usage", compiled)
    kernels = {}
    for mangled, line in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        numbers = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
        keys = ("REG", "STACK", "LOCAL", "SHARED")
        kernels[mangled] = Sass(*(numbers[key] for key in keys))
    current = ""
    for line in _output("-sass", compiled).splitlines():
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


def _output(option: str, compiled: Path) -> str:
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    assert cuobjdump is not None
    assert nvdisasm is not None
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ["PATH"]])  # -sass calls it
    done = subprocess.run(
        [cuobjdump, option, str(compiled)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout
