"""`kimi-pretrain trace`, as a person uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_pretrain.cli import main
from kimi_pretrain.pipeline.costs import Costs, Phases
from kimi_pretrain.pipeline.schedules import k2
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import TraceRows

K2 = ("--schedule", "k2", "--pp", "4", "--vpp", "2", "--microbatches", "8")


def trace(*arguments: str) -> int:
    return main(["trace", *arguments])


def test_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that draws another schedule than the one it was asked for."""
    output = tmp_path / "drawn"
    costs = ("--forward", "1,0,0,0", "--backward", "1,0,0,0", "--weight", "1,0", "--p2p", "0")
    assert (
        trace(
            "--schedule",
            "gpipe",
            "--pp",
            "4",
            "--microbatches",
            "8",
            *costs,
            "--output",
            str(output),
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "gpipe: step 33.000 ms, bubble 27%, one microbatch alone 8.000 ms" in said
    assert "8 (8 layers)" in said
    assert said.splitlines()[-2:] == [
        f"{output / 'trace.json'} (open it in ui.perfetto.dev)",
        str(output / "trace.png"),
    ]
    names = {e["name"] for e in json.loads((output / "trace.json").read_text())["traceEvents"]}
    assert {"0F0", "3B7"} <= names
    assert (output / "trace.png").stat().st_size > 10_000


def test_the_defaults_hide_communication(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches default costs at which the schedule that hides communication does not."""
    steps = {}
    for name in ("k2", "interleaved_1f1b"):
        where = ("--output", str(tmp_path / name))
        assert trace("--schedule", name, *K2[2:], *where) == 0
        steps[name] = float(capsys.readouterr().out.split("step ")[1].split()[0])
    assert steps["k2"] < steps["interleaved_1f1b"]


def test_a_run_beside_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that cannot be drawn from its trace alone, or one drawn without its plan."""
    costs = Costs((1,) * 4, *(Phases(2, 1, 2, 1),) * 2, weight=Phases(attend=2), p2p=0.5)
    timeline = simulate(k2(2, 2, 4), costs)
    for rank, intervals in enumerate(timeline.ranks):
        with TraceRows(tmp_path / "trace", rank, clock_offset=10.0 * rank) as rows:
            for i in intervals:
                rows.add(i.node, i.resource, i.name, i.start - 10 * rank, i.end - 10 * rank)
    assert trace(str(tmp_path)) == 0
    said = capsys.readouterr().out
    planned = f"planned: step {timeline.seconds * 1e3:.1f} ms"
    assert planned in said
    assert f"measured: step {timeline.seconds * 1e3:.1f} ms" in said
    assert (tmp_path / "trace" / "trace.png").is_file()
    assert trace(str(tmp_path), "--p2p", "0", "--output", str(tmp_path / "other")) == 0
    assert planned not in capsys.readouterr().out
    assert (tmp_path / "other" / "trace.json").is_file()


def test_a_schedule_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a file that is drawn although no executor would take it."""
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n\n")
    assert trace("--text", str(path), "--output", str(tmp_path)) == 0
    assert capsys.readouterr().out.startswith("mine: step")
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1F1\n")
    assert trace("--text", str(path), "--output", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "rank 1, position 3" in error


BAD = [
    (),
    ("RUN", *K2),
    ("nowhere",),
    ("--schedule", "k3", *K2[2:]),
    ("--schedule", "k2", "--pp", "4"),
    ("--schedule", "k2", "--microbatches", "4"),
    ("--schedule", "k2", "--pp", "four", "--microbatches", "4"),
    ("--schedule", "k2", "--pp", "0", "--microbatches", "4"),
    (*K2, "--colour", "red"),
    (*K2, "--layers", "1,2"),
    (*K2, "--layers", "0"),
    (*K2, "--layers", "many"),
    (*K2, "--forward", "1,2"),
    (*K2, "--forward", "1,2,3,four"),
    (*K2, "--p2p", "nan"),
    (*K2, "--p2p=-1"),
    (*K2, "--output", "/dev/null/trace"),
    ("--text", "nowhere.csv"),
    ("--text", "."),
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, a page of usage, or files that are written nevertheless."""
    monkeypatch.chdir(tmp_path)
    assert trace(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("kimi-pretrain: ")
    assert said.err.count("\n") == 1
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_needs_no_torch(tmp_path: Path) -> None:
    """Catches an import that makes a drawing wait for torch, or fail on a laptop without it."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kimi_pretrain.cli import main\n"
        f"sys.exit(main(['trace', *{K2!r}, '--output', {str(tmp_path)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches help that fails, or that does not name the schedules."""
    assert trace("--help") == 0
    said = capsys.readouterr().out
    assert "zb_h1" in said
    assert "DISPATCH" in said
