"""A run on two hosts by the hostfile launcher, and one of them lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.distributed.slurm import wait_until
from tests.distributed.two_hosts import INTERFACE, SSHD, Hosts, ssh_servers, two_hosts, why_not

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "kimi_pretrain", "launch"]
STEPS = 8
TIMING = ("seconds", "per_second", "mfu", "goodput")
RUN = (
    "experiment=smoke",
    "precision=fp64",
    "parallel.dp=2",
    "parallel.ep=2",
    "schedule.global_batch_size=8",
    "schedule.micro_batch_size=1",
    f"schedule.max_steps={STEPS}",
    "schedule.checkpoint_interval=2",
    "schedule.eval_interval=0",
    "schedule.sample_tokens=0",
    "schedule.bigram_baseline=false",
    "data.sequence_length=32",
    "logging.report=false",
    "launcher.check_memory=false",
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() != "", reason=why_not())]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if not k.endswith(TIMING)} for row in rows]


def _start(
    hosts: Hosts,
    folder: Path,
    *more: str,
    ssh: Sequence[str] = (),
    stderr: int | TextIO = subprocess.PIPE,
) -> subprocess.Popen[str]:
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    ours = (
        "cluster=cpu",
        "parallel.timeout_seconds=6",
        f"launcher.hostfile={hostfile}",
        f"launcher.ssh={[*ssh] or [str(hosts.ssh)]}",
        f"+launcher.environment.GLOO_SOCKET_IFNAME={INTERFACE}",
        f"run_dir={folder / 'run'}",
    )
    return subprocess.Popen(
        [*PROGRAM, "hostfile", *RUN, *ours, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_a_lost_host_comes_back_and_all_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Catches ranks that wait for ever for a host that is gone, a host started anew that does
    not find the others, and a run that is another one afterwards."""
    whole = tmp_path / "whole"
    local = [*PROGRAM, "local", *RUN, f"run_dir={whole}"]
    with two_hosts(tmp_path) as hosts:
        run = _start(hosts, tmp_path)
        run_dir = tmp_path / "run"
        wait_until(lambda: len(_rows(run_dir)) >= 3 or run.poll() is not None, 120, str)
        hosts.link(1, "down")
        for process in hosts.processes(1):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        assert len(_rows(run_dir)) < STEPS
        subprocess.run(local, cwd=ROOT, check=True, capture_output=True, timeout=120)
        hosts.link(1, "up")
        out, err = run.communicate(timeout=180)
        assert hosts.processes(0) == hosts.processes(1) == []
    assert run.returncode == 0, (out, err)
    assert "kimi-pretrain: 10.77.0.2 ended with code -9; starting it again\n" in err
    assert "resumed from" in out
    assert _rows(run_dir) == _rows(whole)


@pytest.mark.skipif(not SSHD.exists(), reason="no sshd: apt-get install openssh-server")
def test_a_host_that_is_cut_off_is_noticed_over_ssh(tmp_path: Path) -> None:
    """Catches an ssh that waits for hours for a host nobody reaches, while the others' ranks wait
    for it, and a run that does not go on once it can be reached again."""
    run_dir, err = tmp_path / "run", tmp_path / "stderr"
    noticed = "kimi-pretrain: 10.77.0.2 ended with code 255; starting it again\n"
    with two_hosts(tmp_path) as hosts, ssh_servers(hosts, tmp_path) as ssh, err.open("w") as file:
        run = _start(hosts, tmp_path, ssh=ssh, stderr=file)
        wait_until(lambda: len(_rows(run_dir)) >= 3 or run.poll() is not None, 120, err.read_text)
        hosts.link(1, "down")
        assert len(_rows(run_dir)) < STEPS
        try:
            wait_until(lambda: noticed in err.read_text(), 25, err.read_text)
        finally:
            hosts.link(1, "up")
        out, _ = run.communicate(timeout=180)
        # What was cut off has found by itself that nobody waits for it.
        wait_until(lambda: len(hosts.processes(1)) == 1, 90, str)  # the sshd
    assert run.returncode == 0, (out, err.read_text())
    assert "resumed from" in out
    assert [row["step"] for row in _rows(run_dir)] == list(range(1, STEPS + 1))


def test_a_signal_stops_every_host_in_order(tmp_path: Path) -> None:
    """Catches hosts that train on when the command that started them was told to stop."""
    with two_hosts(tmp_path) as hosts:
        run = _start(hosts, tmp_path, "schedule.max_steps=20", "schedule.checkpoint_interval=100")
        run_dir = tmp_path / "run"
        wait_until(lambda: len(_rows(run_dir)) >= 1 or run.poll() is not None, 120, str)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
        assert hosts.processes(0) == hosts.processes(1) == []
    assert run.returncode == 75, (out, err)
    steps = len(_rows(run_dir))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{steps:08d}"]


def test_a_port_that_is_taken_on_the_first_host_is_refused_there(tmp_path: Path) -> None:
    """Catches nodes that join a stranger's port, or wait for a rendezvous nobody holds."""
    with two_hosts(tmp_path) as hosts:
        server = "import socket, time; s = socket.create_server(('', 29400)); time.sleep(60)"
        stranger = hosts.run(0, sys.executable, "-c", server)
        time.sleep(1)
        run = _start(hosts, tmp_path)
        out, err = run.communicate(timeout=150)
        stranger.kill()
        stranger.wait()
    assert run.returncode == 2, (out, err)
    assert "kimi-pretrain: 10.77.0.1: launcher.port: got 29400; the first node holds" in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
