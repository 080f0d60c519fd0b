"""Shared memory, limits and the port."""

import resource
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from kimi_pretrain.config.launcher import LauncherConfig
from kimi_pretrain.doctor.findings import BAD, NOTE, OK
from kimi_pretrain.doctor.limits import limit_findings, limits, port_finding, shm_finding

LOCAL = LauncherConfig()


def test_limits_are_this_process_s() -> None:
    """Catches a hard limit told as the one that counts."""
    assert limits()["ulimit -n"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(("files", "level"), [(1024, NOTE), (65536, OK), (-1, OK)])
def test_few_open_files_are_noted(files: int, level: str) -> None:
    """Catches "unlimited" (-1) taken for the fewest."""
    (found,) = limit_findings({"ulimit -n": files})
    assert found.level == level


@pytest.mark.parametrize(("free", "level"), [(64 << 20, BAD), (16 << 30, OK)])
def test_docker_s_64_mib_of_shared_memory_are_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, level: str
) -> None:
    """Catches NCCL's "unhandled system error" an hour into the queue."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=free, free=free))
    found = shm_finding(tmp_path)
    assert found.level == level
    assert ("--shm-size" in found.fix) == (level == BAD)


def test_a_host_without_shared_memory_is_told(tmp_path: Path) -> None:
    """Catches a traceback where /dev/shm is not mounted."""
    assert shm_finding(tmp_path / "shm").level == BAD


def test_a_taken_port_is_told_and_a_free_one_left_free() -> None:
    """Catches a port that is called free while another job listens, and one that stays bound."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        taken = port_finding(LOCAL, {"MASTER_PORT": port})
    assert taken.level == NOTE
    assert "--rdzv-endpoint" in taken.fix
    assert port_finding(LOCAL, {"MASTER_PORT": port}).level == OK
    assert port_finding(LOCAL, {"MASTER_PORT": port}).level == OK


def test_the_port_is_the_one_at_which_the_launcher_s_nodes_meet() -> None:
    """Catches torchrun's usual port looked at, while nodes will meet at launcher.port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        taken = port_finding(LauncherConfig("slurm", port=port), {"MASTER_PORT": "1"})
    assert (taken.level, taken.fix) == (NOTE, f"launcher.port={port + 1}")
    assert taken.text.startswith(f"{port} cannot be opened")
    assert port_finding(LauncherConfig("hostfile"), {}).text.startswith("29400 ")


def test_a_port_that_is_none_is_told() -> None:
    """Catches an overflow's traceback."""
    assert port_finding(LOCAL, {"MASTER_PORT": "65536"}).level == BAD
    assert port_finding(LOCAL, {"MASTER_PORT": "http"}).level == BAD
