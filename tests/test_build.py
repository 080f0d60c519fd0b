"""What is built where something is missing, and what the builder is told."""

from pathlib import Path

import pytest

from csrc import build


def test_a_missing_torch_leaves_the_library_out_unless_it_is_demanded(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches an installation that fails for want of headers, or drops the kernels in silence."""
    monkeypatch.setattr(build, "find_torch", lambda: None)
    monkeypatch.delenv("KIMI_NATIVE", raising=False)
    assert build.extensions() == []
    assert "no native kernels: torch is not installed" in capfd.readouterr().err
    monkeypatch.setenv("KIMI_NATIVE", "1")
    with pytest.raises(SystemExit, match=r"torch is not installed.*; try KIMI_NATIVE=0"):
        build.extensions()


def test_an_older_torch_or_no_compiler_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a build that ends in a page of missing declarations."""
    monkeypatch.setattr(build, "find_torch", lambda: {"root": "", "version": "2.10.1+cu128"})
    assert build.obstacle() == "torch 2.10.1+cu128 is older than 2.13"
    monkeypatch.setattr(build, "find_torch", lambda: {"root": "", "version": "2.14.0"})
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.obstacle() == "there is no C++ compiler 'no-such-compiler'"


def test_native_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a switch that does not switch."""
    monkeypatch.setenv("KIMI_NATIVE", "0")
    assert build.extensions() == []


def test_cuda_as_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches KIMI_CUDA=1 that builds without CUDA, and KIMI_CUDA=0 that builds with it."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KIMI_CUDA", "auto")
    assert build.find_nvcc() is None
    monkeypatch.setenv("KIMI_CUDA", "1")
    with pytest.raises(SystemExit, match="there is no nvcc"):
        build.find_nvcc()
    monkeypatch.setenv("KIMI_CUDA", "yes")
    with pytest.raises(SystemExit, match="KIMI_CUDA: got 'yes'; one of auto, 0, 1"):
        build.find_nvcc()
    monkeypatch.undo()
    monkeypatch.setenv("KIMI_CUDA", "0")
    assert build.find_nvcc() is None


def test_torch_is_found_where_the_package_will_run() -> None:
    """Catches a build against another torch than the one that loads the library."""
    import torch

    found = build.find_torch()
    assert found is not None
    assert Path(found["root"]) == Path(torch.__file__).parent
    assert (Path(found["root"]) / "include/torch/csrc/stable/library.h").is_file()
