"""The hosts of a hostfile's run: who is started again, who is ended, and by when.

Small shells stand in for ssh. Their standard input is what a host is told by: they wait for it
with ``read`` or ``cat``, or, the stubborn ones, not at all.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kimi_pretrain.launch import hostfile
from kimi_pretrain.launch.hostfile import RunningHosts

TOLD = "cat >/dev/null"  # until the end of standard input
IN_ORDER = "head -c1 >/dev/null; exit 75"  # the byte that asks
STUBBORN = "trap '' TERM; sleep 30; :"  # the sleep is a process of its own
# A test that hangs must fail: well over what any of them takes on a busy machine.
MOST_SECONDS = 15.0


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(hostfile, "AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(hostfile, "KILL_SECONDS", 0.3)
    monkeypatch.setattr(hostfile, "LEAVE_SECONDS", 0.3)


def _hosts(*scripts: str, restarts: int = 0) -> RunningHosts:
    return RunningHosts([["sh", "-c", script] for script in scripts], restarts)


def _run(hosts: RunningHosts) -> int:
    """``hosts.run()``, whose hosts are killed where it does not end."""

    def kill() -> None:
        for process in list(hosts.running.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    alarm = threading.Timer(MOST_SECONDS, kill)
    alarm.start()
    began = time.monotonic()
    try:
        code = hosts.run()
    finally:
        alarm.cancel()
    assert time.monotonic() - began < MOST_SECONDS
    return code


def _counting(file: Path, then: str) -> str:
    return f"echo >>{file}; {then}"


def _starts(file: Path) -> int:
    return len(file.read_text().splitlines())


@pytest.mark.parametrize(("restarts", "starts"), [(0, 1), (2, 3)])
def test_a_host_that_fails_is_started_again_within_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], restarts: int, starts: int
) -> None:
    """Catches a lost host that ends the run, and one that is started for ever."""
    file = tmp_path / "starts"
    hosts = _hosts(TOLD, _counting(file, "exit 255"), restarts=restarts)
    assert _run(hosts) == 4
    assert _starts(file) == starts
    assert capsys.readouterr().err.count("ended with code 255; starting it again") == restarts


def test_a_host_that_came_back_does_not_count_as_lost(tmp_path: Path) -> None:
    """Catches a run that went on to its end and still exits with a failure's code."""
    file = tmp_path / "starts"
    twice = f'test "$(wc -l <{file})" -eq 2'
    first = f"touch {file}; until {twice}; do sleep 0.05; done"
    hosts = _hosts(first, _counting(file, f"{twice} || exit 9"), restarts=1)
    assert _run(hosts) == 0
    assert _starts(file) == 2


@pytest.mark.parametrize("code", [0, 4])
def test_nobody_is_started_again_once_the_first_host_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Catches hosts that are started to wait for a rendezvous nobody holds, and the failure of
    one that waited to be started forgotten."""
    monkeypatch.setattr(hostfile, "AGAIN_SECONDS", 0.6)
    monkeypatch.setattr(hostfile, "LEAVE_SECONDS", 0.7)
    file = tmp_path / "starts"
    first = f"until test -e {file}; do sleep 0.05; done; sleep 0.1; exit {code}"
    assert _run(_hosts(first, _counting(file, "exit 1"), TOLD, restarts=9)) == 1
    assert _starts(file) == 1


def test_all_are_ended_by_one_deadline_and_what_they_started_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a wait for each stubborn host in turn, and a process left behind that holds the
    command's output open, so that who reads it waits on."""
    monkeypatch.setattr(hostfile, "KILL_SECONDS", 0.5)
    output = tmp_path / "output"
    os.mkfifo(output)
    read = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
    began = time.monotonic()
    assert _run(_hosts("sleep 0.3; exit 4", *[f"exec >{output}; {STUBBORN}"] * 6)) == 4
    assert time.monotonic() - began < 3
    with os.fdopen(read, "rb", buffering=0) as reader:
        select.select([reader], [], [], 2)  # killed processes take a moment to end
        assert reader.read(1) == b""  # its end; None: somebody still holds it


@contextmanager
def _signals(hosts: RunningHosts, every: float) -> Iterator[None]:
    """A signal to stop every so many seconds."""
    previous = signal.signal(signal.SIGALRM, hosts.stop)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_signal_stops_every_host_in_order() -> None:
    """Catches hosts that are not told, or ended before they have a checkpoint."""
    hosts = _hosts(IN_ORDER, IN_ORDER, restarts=9)
    with _signals(hosts, every=0.2):
        assert _run(hosts) == 75


def test_a_signal_while_hosts_are_started_is_not_lost() -> None:
    """Catches a host started after the signal, which nobody tells: the run goes on."""
    hosts = _hosts(IN_ORDER, IN_ORDER)
    hosts.stop(signal.SIGINT, None)
    assert _run(hosts) == 75


def test_a_signal_ends_the_wait_for_a_lost_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a host that is started again after the signal to stop."""
    monkeypatch.setattr(hostfile, "AGAIN_SECONDS", 1.0)
    file = tmp_path / "starts"
    hosts = _hosts(IN_ORDER, _counting(file, "exit 4"), restarts=9)
    with _signals(hosts, every=0.4):
        assert _run(hosts) == 4
    assert _starts(file) == 1


def test_a_second_signal_ends_hosts_that_do_not_answer() -> None:
    """Catches a command that waits for ever for hosts out of reach, whatever it is sent."""
    hosts = _hosts(STUBBORN, STUBBORN)
    with _signals(hosts, every=0.1):
        assert _run(hosts) == 4
