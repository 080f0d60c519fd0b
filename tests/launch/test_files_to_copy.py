"""``launch/``: the files that a cluster's user copies do what their README says."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from kimi_pretrain.cli import main
from kimi_pretrain.launch.hosts import Host, read

FOLDER = Path(__file__).parents[2] / "launch"
PLACE = "/shared/kimi_pretrain"  # where the README says that the script was made


def _command() -> list[str]:
    """The words of the README's command after ``kimi-pretrain``."""
    match = re.search(r"^kimi-pretrain (launch slurm --dry-run .*?)^```", README, re.M | re.S)
    assert match is not None
    return shlex.split(match[1].replace("\\\n", " "))


README = (FOLDER / "README.md").read_text()


def test_the_script_is_what_the_launcher_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a script that people copy and that is another than the launcher's of today."""
    monkeypatch.chdir(tmp_path)
    assert main(_command()) == 0
    made = capsys.readouterr().out.replace(str(tmp_path), PLACE)
    assert made == (FOLDER / "k2_1t_h800_2048.sbatch").read_text()


def test_a_sites_own_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a key that the launcher does not know, and one that has no effect."""
    monkeypatch.chdir(tmp_path)
    words = ("launcher=ours", "experiment=smoke", "cluster=h800", "run_dir=a")
    assert main(["launch", "slurm", "--dry-run", "-cd", str(FOLDER), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"#SBATCH --partition=gpu", "#SBATCH --switches=1@10:00"} <= {*lines}
    assert "export NCCL_SOCKET_IFNAME=bond0" in lines


def test_the_hostfile() -> None:
    """Catches a line that the launcher refuses."""
    assert read(str(FOLDER / "hosts")) == [Host("node-0", 8), Host("node-1", 8)]


def test_torchrun_by_hand(tmp_path: Path) -> None:
    """Catches words that the shell splits, and a node that is not told where the others are."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FIRST": "node-0", "NODES": "2"}
    command = [FOLDER / "torchrun.sh", "run_dir='a b'", "seed=1"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[-4:] == ["-m", "kimi_pretrain.train", "run_dir='a b'", "seed=1"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node-0:29400"} <= {*words}
    del variables["FIRST"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "FIRST: the name of the first node" in done.stderr
