"""`kimi-pretrain plan` as a person uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_pretrain.cli import main

K2 = ["model=k2", "parallel.pp=16", "parallel.ep=16", "parallel.dp=128"]


def test_layout_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that is not found, or overrides that do not reach the plan."""
    assert main(["plan", "layout", *K2]) == 0
    assert capsys.readouterr().out.startswith("k2 on 2,048 ranks")


def test_layout_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a line of text around what a program reads, and flags that must come last."""
    assert main(["plan", "layout", "--json", "parallel.dp=2"]) == 0
    assert json.loads(capsys.readouterr().out)["dp"] == 2


def test_plan_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a page that is not written, and a budget that does not reach the plan."""
    page = tmp_path / "plan.html"
    assert main(["plan", "cluster=cpu", "--tokens", "2M", "--html", str(page)]) == 0
    assert "2 M tokens" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert main(["plan", "--json", "cluster=cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"] == "cpu"


def test_a_plan_that_does_not_fit_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a script that submits what its own plan said does not fit."""
    assert main(["plan", "cluster=h800", "cluster.memory_bytes=3e9"]) == 2
    output = capsys.readouterr()
    assert "DOES NOT FIT" in output.out
    assert output.err.startswith("kimi-pretrain: GPU memory of pipeline rank 0 on h800: got '3.")
    assert output.err.count("\n") == 1


def test_search_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches flags of the search that are taken for overrides."""
    search = ["plan", "search", "--gpus", "2", "--top", "1", "cluster=cpu"]
    assert main(search) == 0
    assert "the first as overrides:" in capsys.readouterr().out
    assert main([*search, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranked"]) == 1


@pytest.mark.parametrize(
    "arguments", [["layout", *K2], ["experiment=k2_1t_h800_2048"]], ids=["layout", "plan"]
)
def test_a_plan_of_k2_needs_no_torch(arguments: list[str]) -> None:
    """Catches a plan that waits for torch, or that takes longer than one waits."""
    program = (
        "import sys; from kimi_pretrain.cli import main;"
        f"code = main({['plan', *arguments]!r});"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["layout", "parallel.pp=5"], "try parallel.pp=4"),
        (["layout", "paralel.pp=4"], "parallel.pp"),
        (["layout", "model=k3"], "model="),
        (["layout", "--jsn"], "usage"),
        (["layot"], "KEY=VALUE"),
        ([], "cluster=h800"),
        (["cluster=h900"], "cluster="),
        (["cluster=h800", "--tokens", "many"], "--tokens 15.5T"),
        (["cluster=h800", "--html", "/no/such/folder/plan.html"], "--html"),
        (["cluster=h800", "--htm", "x"], "usage"),
        (["search", "cluster=h800"], "usage"),
        (["search", "--gpus", "0", "cluster=h800"], "--gpus"),
        (["search", "--gpus", "8", "--seconds", "nan", "cluster=h800"], "--seconds"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or a plan of something else than was asked for."""
    assert main(["plan", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert says in output.err
    assert "usage" in output.err or output.err.count("\n") == 1


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches help on stderr or with code 2."""
    assert main(["plan", "layout", "--help"]) == 0
    assert "model=k2" in capsys.readouterr().out
