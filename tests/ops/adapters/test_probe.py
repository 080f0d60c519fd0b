"""A library that is not there, and one that is there and broken."""

from pathlib import Path

import pytest

from kimi_pretrain.ops.adapters.probe import obstacle


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_absent(package: Path) -> None:
    """Catches a traceback where a library is optional."""
    assert obstacle(("no_such_library", "no_such_library.inner"), "it is not installed") == (
        "it is not installed"
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_dependency", "it does not load: No module named 'no_such_dependency'"),
        ("raise RuntimeError('built for CUDA 12\\nand more')", "it does not load: built for CUDA"),
        ("raise OSError('libcudnn.so.9: cannot open')", "it does not load: libcudnn.so.9"),
    ],
)
def test_broken(package: Path, source: str, told: str) -> None:
    """Catches a broken installation that is reported as none at all."""
    name = f"broken_{abs(hash(source))}"
    (package / f"{name}.py").write_text(source)
    found = obstacle((name,), "it is not installed")
    assert found is not None
    assert found.startswith(told)
    assert "\n" not in found


def test_whole(package: Path) -> None:
    """Catches a library that is there and is not used."""
    (package / "whole_library.py").write_text("")
    assert obstacle(("whole_library",), "it is not installed") is None
