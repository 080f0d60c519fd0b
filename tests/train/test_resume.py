"""A run that is killed and started again is the run that was never killed, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.telemetry.jsonl import TIMING_FIELDS

STEPS = 12
RUN = [
    sys.executable,
    "-m",
    "kimi_pretrain",
    "train",
    "experiment=smoke",
    f"schedule.max_steps={STEPS}",
    "schedule.checkpoint_interval=3",
    "schedule.eval_interval=4",
    "logging.layer_interval=1",
    "logging.report=false",
]


def _start(run_dir: Path, *more: str, threads: int = 1) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [*RUN, f"run_dir={run_dir}", *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def _rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_dir / name).read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows]


def _wait_for_rows(run_dir: Path, process: subprocess.Popen[str], count: int) -> None:
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _kill_while_a_checkpoint_is_written(run_dir: Path, process: subprocess.Popen[str]) -> int:
    """The step of the newest checkpoint that was whole at the kill.

    The process is stopped first, to be sure that the kill finds another one without its name.
    """
    root, deadline = run_dir / "checkpoints", time.monotonic() + 180

    def is_writing() -> bool:
        return any(root.glob(".writing-*")) and any(root.glob("step-*"))

    while True:
        while not is_writing():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        if is_writing():
            _kill(process)
            return max(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))
        process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for precision in ("fp32", "bf16"):
        runs[precision] = tmp_path_factory.mktemp("runs") / precision
        _finish(_start(runs[precision], f"precision={precision}"))
    return runs


def _require_the_same_run(run_dir: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "evals.jsonl", "layers.jsonl"):
        assert _rows(run_dir, name) == _rows(whole, name), name
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = (d / last / name for d in (run_dir, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kill_and_start_again_continues_bitwise(
    tmp_path: Path, uninterrupted: dict[str, Path], precision: str
) -> None:
    """Catches anything a checkpoint forgets: momentum, masters, router bias, data position,
    step counts; rows of metrics written twice; half a checkpoint taken for a whole one, and
    one that costs the whole one before it."""
    run_dir = tmp_path / "run"
    for rows in (2, 5):  # before the first checkpoint, and between two
        process = _start(run_dir, f"precision={precision}")
        _wait_for_rows(run_dir, process, rows)
        _kill(process)
    process = _start(run_dir, f"precision={precision}")
    whole = _kill_while_a_checkpoint_is_written(run_dir, process)
    _finish(_start(run_dir, f"precision={precision}"))
    starts = (run_dir / "launches.jsonl").read_text().splitlines()
    assert json.loads(starts[-1])["first_step"] == whole
    assert list(run_dir.glob("checkpoints/.*")) == []
    _require_the_same_run(run_dir, uninterrupted[precision])


def test_two_threads_continue_bitwise(tmp_path: Path) -> None:
    """Catches sums whose order depends on which thread was first: all other runs here have one
    thread, and a person's has as many as there are cores."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    _finish(_start(whole, "precision=bf16", threads=2))
    process = _start(run_dir, "precision=bf16", threads=2)
    _wait_for_rows(run_dir, process, 5)
    _kill(process)
    _finish(_start(run_dir, "precision=bf16", threads=2))
    _require_the_same_run(run_dir, whole)


def test_sigterm_checkpoints_and_says_how_to_go_on(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    """Catches a signal that loses the steps since the last checkpoint, or exit code 0."""
    run_dir = tmp_path / "run"
    process = _start(run_dir, "precision=fp32")
    _wait_for_rows(run_dir, process, 4)
    process.send_signal(signal.SIGTERM)
    output = _finish(process, code=75)
    assert f"run_dir={run_dir}" in "".join(output.split())
    done = len(_rows(run_dir, "metrics.jsonl"))
    assert (run_dir / f"checkpoints/step-{done:08d}").is_dir()
    output = _finish(_start(run_dir, "precision=fp32"))
    assert "resumed" in output
    assert _rows(run_dir, "metrics.jsonl") == _rows(uninterrupted["fp32"], "metrics.jsonl")


def test_a_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    """Catches a resume that trusts the newest name, or starts over in silence."""
    run_dir = tmp_path / "run"
    _finish(_start(run_dir, "precision=fp32", "schedule.max_steps=6"))
    weights = run_dir / "checkpoints/step-00000006/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    output = _finish(_start(run_dir, "precision=fp32"))
    assert "step-00000006/weights.safetensors" in "".join(output.split())
    assert _rows(run_dir, "metrics.jsonl") == _rows(uninterrupted["fp32"], "metrics.jsonl")


def test_resume_false_refuses_to_overwrite(uninterrupted: dict[str, Path]) -> None:
    """Catches a second run that silently replaces the checkpoints of the first."""
    output = _finish(_start(uninterrupted["fp32"], "precision=fp32", "resume=false"), code=2)
    assert "resume=false" in output
    assert len(output.strip().splitlines()) == 1


def test_a_finished_run_started_again_changes_nothing(uninterrupted: dict[str, Path]) -> None:
    """Catches a second ending that appends rows or draws another sample."""
    run_dir = uninterrupted["fp32"]
    before = {p: p.read_bytes() for p in run_dir.iterdir() if p.suffix in {".json", ".jsonl"}}
    _finish(_start(run_dir, "precision=fp32"))
    assert {p: p.read_bytes() for p in before} == before


def test_two_starts_in_one_directory_are_refused(tmp_path: Path) -> None:
    """Catches a second launch that cuts the first one's metrics under its open files."""
    run_dir = tmp_path / "run"
    first = _start(
        run_dir, "precision=fp32", "schedule.stages.1.steps=900", "schedule.max_steps=900"
    )
    _wait_for_rows(run_dir, first, 1)
    output = _finish(_start(run_dir, "precision=fp32"), code=2)
    assert "another process is training in it" in output
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)


def test_a_mixture_shorter_than_the_schedule_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    """Catches a mixture that runs out hours into a run."""
    mixture = "data.mixture=[{weights: {code: 1.0}, tokens: 2048}]"
    output = _finish(_start(tmp_path / "run", mixture), code=2)
    assert "data.mixture" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
