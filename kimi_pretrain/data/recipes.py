"""Corpora that need no network: what a Python installation holds already.

``default``      three domains from the standard library, sympy and mpmath, and the
                 documentation of installed packages; see ``docs/data.md``
``stdlib_tiny``  40 modules of the standard library, for tests

A recipe says which files go into which domain, under which licence, and what a hash must
cover to name the result. The packages are this project's own dependencies, a fixed list:
what else is installed changes nothing.
"""

import hashlib
import importlib.metadata
import platform
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.data.documents import Unit
from kimi_pretrain.data.prepare import DomainInput, Options
from kimi_pretrain.data.sources import grouped, unit_bytes, walk

PYTHON_LICENSE = "PSF-2.0"

# Of an input file: longer ones are tables and generated code, shorter ones hold little.
LONGEST_FILE = 512 << 10
SHORTEST_FILE = 64
# Not text worth learning: tables of characters, broken on purpose, or used elsewhere.
LEFT_OUT = frozenset(
    {
        *("site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"),
        *("encoded_modules", "__pycache__"),
    }
)
TEST_FOLDERS = frozenset({"tests", "test", "testing", "_pyinstaller", "__pycache__"})

# Bytes of source at most: more than any run on a laptop reads, and soon tokenised.
CODE_BYTES = 12_000_000
MATH_BYTES = {"sympy": 6_000_000, "mpmath": 2_000_000}  # by distribution, which is its folder
# Distribution -> folders whose docstrings read as prose.
DOCUMENTED_PACKAGES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "matplotlib": ("matplotlib", "mpl_toolkits"),
    "networkx": ("networkx",),
    "torch": (
        "torch/nn",
        "torch/optim",
        "torch/distributions",
        "torch/linalg",
        "torch/fft",
        "torch/special",
        "torch/autograd",
        "torch/utils/data",
        "torch/cuda",
        "torch/sparse",
        "torch/_torch_docs.py",
        "torch/_tensor_docs.py",
        "torch/functional.py",
        "torch/_tensor.py",
        "torch/hub.py",
        "torch/random.py",
        "torch/serialization.py",
        "torch/distributed/distributed_c10d.py",
    ),
}
# Distributions whose long description is read.
DESCRIBED_PACKAGES = (
    *("torch", "numpy", "sympy", "mpmath", "networkx", "matplotlib", "hydra-core", "omegaconf"),
    *("rich", "safetensors", "tokenizers", "tiktoken", "regex", "requests", "jinja2", "fsspec"),
    *("filelock", "pillow", "fonttools", "pyparsing", "kiwisolver", "contourpy", "packaging"),
    *("pygments", "markdown-it-py", "charset-normalizer", "urllib3", "idna", "certifi"),
    *("python-dateutil", "typing-extensions", "huggingface-hub", "tqdm", "cycler"),
)

TINY_MODULES = (
    *("abc", "argparse", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "configparser"),
    *("contextlib", "copy", "csv", "dataclasses", "enum", "fileinput", "fnmatch", "fractions"),
    *("functools", "getopt", "glob", "gzip", "hashlib", "heapq", "hmac", "io", "keyword"),
    *("linecache", "numbers", "operator", "queue", "quopri", "random", "reprlib", "sched"),
    *("secrets", "shelve", "shlex", "string", "textwrap", "tempfile"),
)


@dataclass(frozen=True)
class Recipe:
    """A corpus by name.

    ``version`` is raised when the same installation shall give another corpus.
    ``collect`` finds the input by domain. ``state`` is everything, beside version and
    tokenizer, that decides the result. ``sample_bytes`` is what a BPE is trained on.
    """

    name: str
    version: int
    options: Options
    collect: Callable[[], dict[str, DomainInput]]
    state: Callable[[], list[str]]
    sample_bytes: Mapping[str, int]


def _default() -> dict[str, DomainInput]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    code = capped(stdlib, (".",), CODE_BYTES, skip=LEFT_OUT)
    math: list[Unit] = []
    licenses = {}
    for name, limit in MATH_BYTES.items():
        found = installed(name)
        if found is not None:
            units = capped(found.folder, (name,), limit)
            math += labelled(units, "text", found.label)
            licenses[found.label] = found.license
    python = f"CPython {platform.python_version()}"
    prose, prose_licenses = _prose(python, stdlib)
    return {
        "code": domain(labelled(code, "text", python), {python: PYTHON_LICENSE}),
        "math": domain(math, licenses),
        "prose": domain(prose, prose_licenses),
    }


def _prose(python: str, stdlib: Path) -> tuple[list[Unit], dict[str, str]]:
    licenses = {python: PYTHON_LICENSE}
    units: list[Unit] = []
    for name in dict.fromkeys((*DOCUMENTED_PACKAGES, *DESCRIBED_PACKAGES)):
        found = installed(name)
        if found is None:
            continue
        licenses[found.label] = found.license
        folders = DOCUMENTED_PACKAGES.get(name, ())
        files = capped(found.folder, folders, skip=TEST_FOLDERS)
        if name in DESCRIBED_PACKAGES:
            files += found.metadata()
        units += labelled(files, "prose", found.label)
    topics = stdlib / "pydoc_data" / "topics.py"
    if topics.is_file():
        units += labelled([topics], "prose", python)
    return units, licenses


def _stdlib_tiny() -> dict[str, DomainInput]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [stdlib / f"{name}.py" for name in TINY_MODULES]
    python = f"CPython {platform.python_version()}"
    units = labelled([file for file in files if file.is_file()], "text", python)
    return {"code": domain(units, {python: PYTHON_LICENSE})}


@dataclass(frozen=True)
class Installed:
    """An installed distribution: where its packages lie, name with version, licence."""

    distribution: importlib.metadata.Distribution
    folder: Path
    label: str
    license: str

    def metadata(self) -> list[Path]:
        """Its METADATA file, which holds the long description, if it has one."""
        files = self.distribution.files or []
        paths = [Path(str(file.locate())) for file in files if file.name == "METADATA"]
        return [path for path in paths[:1] if path.is_file()]


def installed(name: str) -> Installed | None:
    """An installed distribution, or None. Reads its metadata and imports nothing."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(found.locate_file("")))
    return Installed(found, folder, f"{name} {found.version}", license_of(found.metadata))


def license_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """A distribution's licence: the SPDX expression, else the classifier, else the first line."""
    values = {key.lower(): value for key, value in metadata.json.items()}
    if "license_expression" in values:
        return str(values["license_expression"])
    classifiers = values.get("classifier", [])
    named = [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    if named:
        return " AND ".join(named)
    lines = str(values.get("license", "")).strip().splitlines()
    return lines[0] if lines else "not stated"


def capped(
    root: Path,
    below: Sequence[str],
    limit: int | None = None,
    skip: frozenset[str] = frozenset(),
) -> list[Path]:
    """Python files of some folders or files below a root, `limit` bytes of them at most.

    In the order of a hash of their paths, so that a cut, and any run of neighbours, is a
    fair sample. Files of odd sizes and those below a folder in `skip` are left out.
    """
    found: list[tuple[bytes, int, Path]] = []
    for part in below:
        start = root / part
        for path in [start] if start.is_file() else walk(start, skip) if start.is_dir() else ():
            size = path.stat().st_size
            if path.suffix == ".py" and SHORTEST_FILE <= size <= LONGEST_FILE:
                relative = path.relative_to(root).as_posix()
                found.append((hashlib.sha256(relative.encode()).digest(), size, path))
    chosen, total = [], 0
    for _, size, path in sorted(found):
        if limit is None or total + size <= limit:
            chosen.append(path)
            total += size
    return chosen


def labelled(files: Sequence[Path], reader: str, source: str) -> list[Unit]:
    """One unit a file."""
    return [Unit(reader, (str(file),), file.stat().st_size, source) for file in files]


def domain(units: Sequence[Unit], licenses: Mapping[str, str]) -> DomainInput:
    """Group files into units of the size their sum asks for."""
    limit = unit_bytes(sum(unit.size for unit in units))
    return DomainInput(list(grouped(units, limit)), licenses)


def _stdlib_state() -> list[str]:
    """Version of Python, and which library comes with it: some systems leave the tests out."""
    tests = sorted((Path(sysconfig.get_path("stdlib")) / "test").glob("*.py"))
    return [
        platform.python_implementation(),
        platform.python_version(),
        *(path.name for path in tests),
    ]


def _installed_state() -> list[str]:
    names = dict.fromkeys((*MATH_BYTES, *DOCUMENTED_PACKAGES, *DESCRIBED_PACKAGES))
    state = _stdlib_state()
    for name in names:
        try:
            state.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return state


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "default",
            version=1,
            options=Options(heldout=0.03, dedup="whitespace"),
            collect=_default,
            state=_installed_state,
            sample_bytes={"code": 4_000_000, "math": 2_000_000, "prose": 2_000_000},
        ),
        Recipe(
            "stdlib_tiny",
            version=1,
            # One in seven of 40 modules: a smaller share could leave none.
            options=Options(heldout=0.15, dedup="whitespace"),
            collect=_stdlib_tiny,
            state=_stdlib_state,
            sample_bytes={"code": 1_000_000},
        ),
    )
}
