"""`kimi-pretrain doctor` on one process, and as ranks that it starts itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.doctor.commands import main

SECRET = "hunter2hunter2"


def never(arguments: list[str], ranks: int) -> int:
    raise AssertionError(f"started {ranks} ranks with {arguments}")


def test_one_process_examines_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a report without what a bug needs, one with a secret in it, and output that
    programs cannot read."""
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", f"eth-{SECRET}")
    monkeypatch.setenv("NCCL_API_KEY", "another-secret")
    report = tmp_path / "doctor.txt"
    code = main([f"run_dir={tmp_path}", "--json", "--report", str(report)], never)
    told = json.loads(capsys.readouterr().out)
    assert told["fit"] == (code == 0)
    assert told["ranks"] == 1
    assert {"port", "shared memory", "torch", f"disk of {tmp_path}"} <= {
        finding["what"] for finding in told["findings"]
    }
    assert [probe["name"] for probe in told["probes"]] == [
        "matmul 384 x 384 float32",
        "memory copy",
    ]
    text = report.read_text()
    assert "variable NCCL_SOCKET_IFNAME" in text
    for needed in ("version of torch", "kernel of swiglu", "ulimit -n", "eth-***"):
        assert needed in text
    assert SECRET not in text + json.dumps(told)
    assert "another-secret" not in text


def test_a_person_reads_what_is_bad_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a verdict that scrolls away, and a node without GPUs that is fit for a cluster."""
    assert main([f"run_dir={tmp_path}", "cluster=h800"], never) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("not fit for a run: ")
    assert lines[-2].startswith(" BAD ")
    assert any("no GPU here" in line and "cluster=h800 has 8" in line for line in lines)
    assert any(line.startswith("kernels, ") and "swiglu" in line for line in lines)


def test_several_ranks_are_started_with_the_same_command_line() -> None:
    """Catches a preflight of 16 ranks that examines one."""
    started: list[tuple[list[str], int]] = []

    def launch(arguments: list[str], ranks: int) -> int:
        started.append((arguments, ranks))
        return 3

    argv = ["parallel.pp=2", "parallel.vpp=2", "parallel.schedule=k2", "parallel.dp=8", "--json"]
    assert main(argv, launch) == 3
    assert started == [(argv, 16)]


def test_a_cluster_s_ranks_are_not_started_on_one_host() -> None:
    """Catches a login node on which somebody examines a preset of 2,048 ranks."""
    with pytest.raises(ConfigError, match=r"got 2048; .*-m kimi_pretrain\.doctor"):
        main(["experiment=k2_1t_h800_2048"], never)


@pytest.mark.parametrize(
    "argv", [["--often"], ["modle=k2"], ["--report", "/nowhere/doctor.txt"]], ids=" ".join
)
def test_bad_input_is_one_line(argv: list[str]) -> None:
    """Catches a report that cannot be written, told after minutes of probes."""
    with pytest.raises(ConfigError) as caught:
        main(argv, never)
    assert "\n" not in str(caught.value)


def test_the_command_starts_its_ranks(tmp_path: Path) -> None:
    """Catches ranks that all print, and a code that torchrun swallows."""
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kimi_pretrain", "doctor", "parallel.dp=2"),
            *(f"run_dir={tmp_path}", "--json"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(done.stdout)
    assert told["ranks"] == 2
    assert done.returncode == (0 if told["fit"] else 3), done.stderr
