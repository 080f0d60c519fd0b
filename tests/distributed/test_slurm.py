"""Jobs on a real Slurm: submitted, signalled as before a time limit, run to the end."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.slurm import Slurm, free_ports, running_slurm, wait_until, why_not

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "kimi_pretrain", "launch", "slurm"]
STEPS = 20
TIMING = ("seconds", "per_second", "mfu", "goodput")
RUN = (
    "experiment=smoke",
    "precision=fp64",
    "parallel.dp=4",
    "parallel.ep=2",
    "parallel.timeout_seconds=60",
    "schedule.global_batch_size=8",
    "schedule.micro_batch_size=1",
    f"schedule.max_steps={STEPS}",
    "schedule.checkpoint_interval=100",
    "schedule.eval_interval=0",
    "schedule.sample_tokens=0",
    "data.sequence_length=32",
    "logging.report=false",
    "cluster=cpu",
    "launcher.time=20",
    "launcher.check_memory=false",
    f"launcher.port={free_ports(1)[0]}",  # other tests have the usual one
    "launcher.address=127.0.0.1",  # names of virtual nodes do not resolve
)

pytestmark = pytest.mark.skipif(why_not() != "", reason=why_not())


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm(nodes=2) as slurm:
        yield slurm


def _launch(slurm: Slurm, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *RUN, f"run_dir='{run_dir}'", *more],
        cwd=ROOT,
        env=slurm.variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _submit(slurm: Slurm, run_dir: Path, *more: str) -> str:
    """The number of the job."""
    done = _launch(slurm, run_dir, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if not k.endswith(TIMING)} for row in rows]


def _log(run_dir: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(run_dir.glob("logs/slurm-*.log")))


def _wait(slurm: Slurm, number: str, state: str, run_dir: Path) -> None:
    def here() -> bool:
        now = slurm.state(number)
        story = f"{slurm.job(number)}\n{_log(run_dir)}\n{slurm.story()}"
        assert now in {state, "PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}, story
        return now == state

    wait_until(here, 150, lambda: f"{slurm.job(number)}\n{_log(run_dir)}")


def test_a_job_that_is_stopped_before_its_time_limit_ends_as_one_that_is_not(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Catches a script that Slurm or its nodes read otherwise than it was meant, nodes that do
    not meet, ranks killed by the signal, a job that ends there, and a resume that is another
    run: rows and every number must be those of the job that nothing disturbed."""
    whole = tmp_path / "a whole run"
    number = _submit(slurm, whole)
    _wait(slurm, number, "COMPLETED", whole)
    assert [row["step"] for row in _rows(whole)] == list(range(1, STEPS + 1))
    _a_log_for_every_rank(whole)

    run_dir = tmp_path / "run"
    number = _submit(slurm, run_dir)
    wait_until(lambda: len(_rows(run_dir)) >= 2, 120, lambda: _log(run_dir))
    slurm.ask("scancel", "--signal=USR1", number)
    wait_until(lambda: slurm.job(number)["Restarts"] == "1", 60, lambda: _log(run_dir))
    wait_until(lambda: slurm.state(number) == "PENDING" and slurm.idle() == 2, 60, slurm.story)
    stopped = len(_rows(run_dir))
    assert 2 <= stopped < STEPS
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == [
        f"step-{stopped:08d}"
    ]
    time.sleep(2)  # credentials of the second in which the job was ended are void
    slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")  # else in two minutes
    _wait(slurm, number, "COMPLETED", run_dir)
    assert f"job {number}.0 ended with code 75 and goes back into the queue" in _log(run_dir)
    assert _rows(run_dir) == _rows(whole)


def _a_log_for_every_rank(run_dir: Path) -> None:
    logs = [path.relative_to(run_dir).parts for path in run_dir.glob("logs/*.0/*/*/*/*/stderr.log")]
    ranks = [(node, rank) for node in ("n0", "n1") for rank in ("0", "1")]
    assert sorted((parts[2], parts[5]) for parts in logs) == ranks
    assert "loss" in _log(run_dir)


def test_a_cancelled_job_stays_so_with_a_checkpoint(slurm: Slurm, tmp_path: Path) -> None:
    """Catches scancel, after which the job is in the queue again, and ranks that it kills before
    they have a checkpoint."""
    run_dir = tmp_path / "run"
    number = _submit(slurm, run_dir)
    wait_until(lambda: len(_rows(run_dir)) >= 2, 120, lambda: _log(run_dir))
    slurm.ask("scancel", number)
    _wait(slurm, number, "CANCELLED", run_dir)
    assert slurm.job(number)["Restarts"] == "0"
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert names == [f"step-{len(_rows(run_dir)):08d}"]


def test_a_second_launch_into_a_run_directory_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    """Catches two jobs that would mix their rows, the first of which only waits yet."""
    run_dir = tmp_path / "run"
    number = _submit(slurm, run_dir, "+launcher.options.hold=''")
    again = _launch(slurm, run_dir)
    slurm.ask("scancel", number)
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert f"job {number} trains in it, or waits to" in again.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["launcher.partition=nowhere"], "sbatch: got 'sbatch: error: invalid partition"),
        (["launcher.ranks_per_node=3"], "they fill whole nodes of 3"),
        (["run_dir=/proc/run"], "it must be writable"),
    ],
)
def test_what_cannot_run_is_one_line(
    slurm: Slurm, tmp_path: Path, more: list[str], says: str
) -> None:
    """Catches a job in the queue that can only fail, and a traceback."""
    done = _launch(slurm, tmp_path / "run", *more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says.lower() in done.stderr.lower()
    assert slurm.ask("squeue", "--noheader") == ""


def test_a_port_that_is_taken_ends_the_job_at_once(slurm: Slurm, tmp_path: Path) -> None:
    """Catches nodes that join a stranger, and a second node that waits for minutes for a
    rendezvous that the first may not hold."""
    run_dir = tmp_path / "run"
    with socket.create_server(("", 0)) as stranger:
        port = stranger.getsockname()[1]
        number = _submit(slurm, run_dir, f"launcher.port={port}")
        wait_until(lambda: slurm.state(number) == "FAILED", 90, lambda: _log(run_dir))
    assert slurm.job(number)["ExitCode"] == "2:0"
    assert _log(run_dir).startswith(f"kimi-pretrain: launcher.port: got {port}; another program")
    assert _log(run_dir).count("\n") == 1


@pytest.mark.slow
def test_the_time_limit_itself(slurm: Slurm, tmp_path: Path) -> None:
    """Catches a signal that Slurm sends otherwise than scancel, or too late for a checkpoint."""
    run_dir = tmp_path / "run"
    steps = "schedule.stages=[{name: all, shape: constant, steps: 100000}]"
    long = ("schedule.max_steps=null", steps, "launcher.time=2", "launcher.stop_seconds=60")
    number = _submit(slurm, run_dir, *long)
    wait_until(lambda: slurm.job(number)["Restarts"] == "1", 180, lambda: _log(run_dir))
    assert f"job {number}.0 ended with code 75 and goes back into the queue" in _log(run_dir)
    slurm.ask("scancel", number)
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert names == [f"step-{len(_rows(run_dir)):08d}"]


@pytest.mark.slow
def test_hydras_own_launcher_sweeps_on_slurm(slurm: Slurm, tmp_path: Path) -> None:
    """Catches a job function that submitit cannot carry to a node, and jobs that share a folder."""
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher",
        reason="no hydra-submitit-launcher: `make test-slurm`",
    )
    sweep = (
        *("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=null"),
        *("hydra.launcher.timeout_min=5", f"hydra.sweep.dir={tmp_path}/sweep", "seed=0,1"),
        *("experiment=smoke", "schedule.max_steps=2", "schedule.sample_tokens=0"),
        *("schedule.bigram_baseline=false", "logging.report=false"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "kimi_pretrain", "train", *sweep],
        cwd=ROOT,
        env=slurm.variables,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [len(_rows(tmp_path / "sweep" / job)) for job in ("0", "1")] == [2, 2]
