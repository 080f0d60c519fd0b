"""One node of several: its options, its port, its start."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.launch.node import MODULE, STOP, Node, main, parse, require_free_port

NODE = Node(
    nodes=2,
    ranks=8,
    address="10.0.0.1",
    port=29400,
    run_id="7.0",
    max_restarts=3,
    logs="/runs/a b/logs",
    name="10.0.0.2",
    number=1,
    watch=True,
)


def test_a_node_reads_what_a_launcher_writes() -> None:
    """Catches an option that only one side knows, and a `--` among the ranks' own words."""
    assert parse([*NODE.arguments(), "--", "a=1", "--", "b"]) == (NODE, ["a=1", "--", "b"])


def test_only_the_first_node_holds_the_rendezvous() -> None:
    """Catches nodes that each wait at a rendezvous of their own."""
    first, other = NODE.torchrun(True, "n0"), NODE.torchrun(False, "n1")
    assert "--rdzv-conf=is_host=1" in first
    assert "--rdzv-conf=is_host=0" in other
    assert "--local-addr=10.0.0.2" in other
    assert [word for word in first if "log-dir" in word] == ["--log-dir=/runs/a b/logs/n0"]


def test_a_taken_port_is_named_before_torchrun_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches nodes that join a stranger; the fix must be a port that is free."""
    with socket.create_server(("", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(ConfigError) as error:
            require_free_port(port)
        require_free_port(int(error.value.fix.split("=")[1].split(",")[0]))
        words = [f"--logs={tmp_path}", "--nodes=1", "--ranks=1", "--address=a", "--number=0"]
        more = [f"--port={port}", "--run-id=1", "--max-restarts=0", "--name=here"]
        assert main([*words, *more, "--"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kimi-pretrain: here: launcher.port: got {port}; ")
    assert err.count("\n") == 1


def test_a_log_folder_that_cannot_be_made_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a node without the shared file system that shows a traceback."""
    words = ["--logs=/proc/none", "--nodes=1", "--ranks=1", "--address=a", "--number=1"]
    assert main([*words, "--port=29400", "--run-id=1", "--max-restarts=0", "--name=n1", "--"]) == 2
    assert "n1: run_dir: got '/proc/none'; every node writes" in capsys.readouterr().err


@pytest.mark.parametrize("wrapper", [[], ["nohup"]], ids=["plain", "nohup"])
def test_a_node_that_is_told_to_stop_before_it_has_started_stops(
    tmp_path: Path, wrapper: list[str]
) -> None:
    """Catches a signal before anybody heard it, which ended the node as if it had been lost, and
    one that torchrun does not hear since it was started to ignore it."""
    node = replace(NODE, nodes=1, ranks=1, logs=str(tmp_path), number=0)
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", MODULE, *node.arguments(), "--"],
        input=STOP,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (143, b"")
