"""Ranks of this machine: what each is told, and a training that they end with."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.launch.nodes import world_size
from kimi_pretrain.train.command import main

ROOT = Path(__file__).parents[2]


def _until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(process: int) -> bool:
    """Whether it runs; a zombie that a container's first process never collects does not."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


# --- what each rank is told ------------------------------------------------------------------


def _told(monkeypatch: pytest.MonkeyPatch, *argv: str) -> list[tuple[Config, int]]:
    """The configuration that each launched job's ranks compose, and how many they are."""
    monkeypatch.delenv("RANK", raising=False)
    jobs: list[tuple[Config, int]] = []

    def launch(arguments: list[str], config: Config) -> int:
        jobs.append((compose(arguments), world_size(config)))
        return 0

    assert main(list(argv), launch) == 0
    return jobs


SEVERAL = ("experiment=smoke", "parallel.ep=2", "parallel.dp=4", "schedule.global_batch_size=8")


def test_ranks_compose_what_the_parent_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an override lost on the way, and a run directory that Hydra reads otherwise."""
    run_dir = "runs/a b,c=[1]'s"
    quoted = run_dir.replace("'", "\\'")
    override = "schedule.stages=[{name: only one, shape: constant, steps: 7}]"
    ((config, ranks),) = _told(monkeypatch, *SEVERAL, "seed=3", override, f"run_dir='{quoted}'")
    assert (ranks, config.seed, config.parallel.dp, config.run_dir) == (4, 3, 4, run_dir)
    assert [(stage.name, stage.steps) for stage in config.schedule.stages] == [("only one", 7)]


def test_ranks_get_the_default_run_directory_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that each take the time of their own start."""
    ((config, _),) = _told(monkeypatch, *SEVERAL)
    assert re.fullmatch(r"runs/\d{8}-\d{6}", config.run_dir)


def test_a_sweep_launches_job_by_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches ranks that sweep themselves, and jobs that share a run directory."""
    sweep = f"hydra.sweep.dir={tmp_path}"
    jobs = _told(monkeypatch, "-m", *SEVERAL, "seed=1,2", "parallel.dp=2,4", sweep)
    assert [(config.seed, ranks) for config, ranks in jobs] == [(1, 2), (2, 2), (1, 4), (2, 4)]
    assert [config.run_dir for config, _ in jobs] == [f"{tmp_path}/{job}" for job in range(4)]


def test_nothing_starts_on_a_configuration_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches eight processes started only to print one line eight times."""
    for override in ("schedule.global_batch_size=6", "parallel.ep=3"):
        with pytest.raises(ConfigError):
            _told(monkeypatch, *SEVERAL, override)


def test_a_rank_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that start ranks."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    started: list[int] = []
    with pytest.raises(ConfigError, match="number of ranks"):
        main([*SEVERAL], lambda _, ranks: started.append(ranks) or 0)
    assert started == []


# --- the real thing --------------------------------------------------------------------------


def _start_training(run_dir: Path) -> subprocess.Popen[str]:
    """A run of two ranks that would last for hours, past its first step."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    overrides = ["experiment=smoke", "parallel.ep=2", "parallel.dp=2", "schedule=smoke"]
    overrides += ["schedule.stages=[{name: all, shape: constant, steps: 100000}]"]
    overrides += ["schedule.max_steps=null", "schedule.eval_interval=0", f"run_dir={run_dir}"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "kimi_pretrain", "train", *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    _until(lambda: parent.poll() is not None or (metrics.exists() and metrics.read_text() != ""))
    return parent


def _children(process: int) -> list[int]:
    stats = [file.read_text() for file in Path("/proc").glob("[0-9]*/stat") if file.exists()]
    fields = [(stat.split()[0], stat.rpartition(")")[2].split()[1]) for stat in stats]
    return [int(child) for child, parent in fields if parent == str(process)]


def test_training_ranks_stop_with_a_checkpoint(tmp_path: Path) -> None:
    """Catches a stop in which one rank is ended before the others have its part on disk."""
    parent = _start_training(tmp_path / "run")
    parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 75, err
    assert err == ""
    assert out.count("stopped after step") == 1
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_killed_training_rank_ends_the_run(tmp_path: Path) -> None:
    """Catches ranks that wait in a collective for one that is gone."""
    parent = _start_training(tmp_path / "run")
    (agent,) = _children(parent.pid)
    ranks = _children(agent)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 4, err
    assert "Traceback" not in err
    assert re.search(r"^kimi-pretrain: rank \d was killed by SIGKILL", err, re.MULTILINE)
    _until(lambda: not any(map(_alive, ranks)))
