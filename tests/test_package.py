"""What a person installs: the wheel holds the program and its configuration."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from csrc import build

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build/ of an earlier day leaks into a package."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("kimi_pretrain", "conf", "csrc"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    subprocess.run(
        [*command, "-w", str(target), str(source)],
        check=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "KIMI_CUDA": "0"},  # nvcc's part has tests of its own
    )
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_every_configuration(source: Path, wheel: Path) -> None:
    """Catches a package without __init__.py and a YAML file that only a checkout has."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(f.relative_to(source)) for f in (source / "kimi_pretrain").rglob("*.py")}
    conf = {f"kimi_pretrain/{f.relative_to(source)}" for f in (source / "conf").rglob("*.yaml")}
    assert len(conf) > 30
    assert modules | conf | {"kimi_pretrain/py.typed"} <= inside
    foreign = [name for name in inside if not name.startswith(("kimi_pretrain/", "kimi_pretrain-"))]
    assert foreign == []


def test_the_wheel_holds_the_native_library(wheel: Path) -> None:
    """Catches a library that is built beside the sources and left out of the package."""
    if build.obstacle() is not None:
        pytest.skip(f"not built here: {build.obstacle()}")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kimi_pretrain/ops/native/_kernels.so" in names
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]


def test_the_installed_torch_can_be_compiled_against(wheel: Path) -> None:
    """Catches a floor that pip keeps and for which csrc/ is then left out."""
    (metadata,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA")]
    floor = ".".join(map(str, build.TORCH_FLOOR))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    assert f"Requires-Dist: torch>={floor}" in lines


def test_the_installed_program_trains_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    """Catches an installation that finds conf/ only beside the sources, or no kernels at all."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    overrides = [
        *("experiment=smoke", "run_dir=run", "schedule.max_steps=2", "schedule.eval_sequences=4"),
        *("schedule.sample_tokens=0", "logging.report=false"),
    ]
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r});"
        "from kimi_pretrain.config.composition import conf_dir;"
        f"assert conf_dir().is_relative_to({str(site.resolve())!r}), conf_dir();"
        "from kimi_pretrain.cli import main;"
        f"sys.exit(main(['train', *{overrides}]))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len((elsewhere / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    if build.obstacle() is None:
        assert "kernels    native" in done.stdout


def test_importing_the_package_is_free() -> None:
    """Catches an import of torch by ``import kimi_pretrain``, and public names that are gone."""
    program = "import sys, kimi_pretrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_a_fresh_environment_installs_and_runs(source: Path, tmp_path: Path) -> None:
    """Catches a dependency that only the developers' environment has, and a torch that pip's
    isolated build does not find: the kernels would be left out."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    for what in ("torch==2.13.0", str(source)):
        subprocess.run([str(python), "-m", "pip", "install", "-q", what], check=True)
    program = str(tmp_path / "venv" / "bin" / "kimi-pretrain")
    command = [program, "train", "experiment=smoke", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, check=True, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    if shutil.which(build.compiler()) is not None:
        assert "kernels    native" in done.stdout
