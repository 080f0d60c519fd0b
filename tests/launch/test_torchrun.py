"""Ranks started here: their exit codes, their signals, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PARENT = """\
import sys
from kimi_pretrain.launch.torchrun import run_ranks
options = ["--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1", sys.argv[1]]
code = run_ranks("tests.launch.program", sys.argv[2:], options)
assert "torch" not in sys.modules
sys.exit(code)
"""


def _launch(*arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", _PARENT, f"--max-restarts={restarts}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def _ranks(folder: Path) -> list[int]:
    """Process ids of both ranks once they run."""
    files = [folder / "0", folder / "1"]
    _until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_the_ranks_code_is_the_programs(code: int, tmp_path: Path) -> None:
    """Catches torchrun's own code 1 and its page about failed children."""
    parent = _launch(f"end{code}", tmp_path, "a b", "key='x'")
    out, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (code, "")
    if code == 0:  # otherwise torchrun may have ended rank 0 before it spoke
        assert out == "2 1 ['a b', \"key='x'\"]\n"


def test_a_defect_shows_its_traceback_once(tmp_path: Path) -> None:
    """Catches a rank's traceback that is swallowed, or survivors that sleep on."""
    parent = _launch("defect", tmp_path)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert err.count("Traceback") == 1
    assert err.strip().endswith("ZeroDivisionError: a defect of rank 1")


def test_a_killed_rank_is_named_and_nothing_stays(tmp_path: Path) -> None:
    """Catches the survivors of a kill -9, and a code that says nothing."""
    parent = _launch("killed", tmp_path)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 4
    assert err == (
        "kimi-pretrain: rank 1 was killed by SIGKILL (out of memory?); the run has ended\n"
    )
    first = tmp_path / "0"
    assert not first.exists() or not _alive(int(first.read_text()))


def test_a_kill_that_torchrun_restarts_from_is_named(tmp_path: Path) -> None:
    """Catches a run that restarts again and again and never says which rank was lost."""
    parent = _launch("killed", tmp_path, restarts=1)
    _, err = parent.communicate(timeout=60)
    line = "kimi-pretrain: 127.0.0.1: local rank 1 was killed by SIGKILL\n"
    assert parent.returncode == 4
    assert err == 2 * line + (
        "kimi-pretrain: rank 1 was killed by SIGKILL (out of memory?); the run has ended\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    """Catches ranks killed before their checkpoint, and one that hears nothing."""
    parent = _launch("stop", tmp_path)
    ranks = _ranks(tmp_path)
    parent.send_signal(number)
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (75, "")
    assert not any(map(_alive, ranks))
    assert (tmp_path / "signals-0").exists()
    assert (tmp_path / "signals-1").exists()


def test_many_sigterms_are_one_wish(tmp_path: Path) -> None:
    """Catches a torchrun that kills ranks in the midst of their checkpoint: Slurm, cancelling or
    preempting a job, sends SIGTERM to it, to its parent and to every rank."""
    parent = _launch("stop", tmp_path)
    ranks = _ranks(tmp_path)
    (agent,) = {int(Path(f"/proc/{rank}/stat").read_text().split()[3]) for rank in ranks}
    for process in (*ranks, agent, parent.pid, parent.pid):
        os.kill(process, signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (75, "")
    assert (tmp_path / "signals-0").exists()
    assert (tmp_path / "signals-1").exists()


def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(tmp_path: Path) -> None:
    """Catches a run that nothing but kill -9 ends."""
    parent = _launch("deaf", tmp_path)
    ranks = _ranks(tmp_path)
    for _ in range(2):
        parent.send_signal(signal.SIGINT)
        time.sleep(1)  # or two signals become one where the cores are busy
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (143, "")
    assert not any(map(_alive, ranks))


def test_ranks_that_a_signal_finds_starting_do_not_start_again(tmp_path: Path) -> None:
    """Catches ranks that torchrun starts anew, to train on, because the signal killed them
    before they knew it."""
    parent = _launch("starting", tmp_path, restarts=2)
    _ranks(tmp_path)
    parent.send_signal(signal.SIGUSR1)
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err.count("Traceback")) == (143, 0)


def test_ranks_end_with_their_torchrun(tmp_path: Path) -> None:
    """Catches orphans that train on after torchrun itself was killed."""
    parent = _launch("sleep", tmp_path)
    ranks = _ranks(tmp_path)
    (agent,) = {int(Path(f"/proc/{rank}/stat").read_text().split()[3]) for rank in ranks}
    os.kill(agent, signal.SIGKILL)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 4
    assert err == "kimi-pretrain: torchrun was killed by SIGKILL; its ranks have ended\n"
    _until(lambda: not any(map(_alive, ranks)))


def test_ranks_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    """Catches orphans that hold the cores after the command line itself was killed."""
    parent = _launch("sleep", tmp_path)
    ranks = _ranks(tmp_path)
    parent.kill()
    parent.communicate(timeout=60)
    _until(lambda: not any(map(_alive, ranks)))
