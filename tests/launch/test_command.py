"""``kimi-pretrain launch``: its words, and what is refused before anything starts."""

import shlex
from pathlib import Path

import pytest

from kimi_pretrain.checkpoint.run_lock import hold_run_dir
from kimi_pretrain.cli import main
from kimi_pretrain.config.launcher import SSH
from kimi_pretrain.launch import command
from kimi_pretrain.launch.command import Launch, parse

SMALL = ("experiment=smoke", "parallel.dp=2", "schedule.global_batch_size=8")


def test_words() -> None:
    """Catches a dry run that starts something, and a site's own group that is not used."""
    assert parse(["slurm", "--dry-run", "a=1"]) == Launch("slurm", ["launcher=slurm", "a=1"], True)
    assert parse(["slurm", "launcher=ours"]) == Launch("slurm", ["launcher=ours"], False)


def _said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["launch", *words])
    return code, *capsys.readouterr()


def test_a_dry_run_prints_the_script_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run directory made, or a job submitted, by looking."""
    monkeypatch.chdir(tmp_path)
    code, out, err = _said(capsys, "slurm", "--dry-run", *SMALL, "cluster=cpu", "run_dir='my run'")
    assert (code, err) == (0, "")
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=kimi-my-run-")
    assert not list(tmp_path.iterdir())


def test_ranks_do_not_get_the_launchers_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches ranks that would launch again, and a resume refused for its launcher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    group = tmp_path / "mine" / "launcher"
    group.mkdir(parents=True)
    (group / "ours.yaml").write_text("name: hostfile\nport: 29999\n")
    words = ("-cd", "mine", "launcher=ours", "launcher.hostfile=hosts")
    variable = "+launcher.environment.A=b"
    code, out, _ = _said(capsys, "hostfile", "--dry-run", *words, *SMALL, variable, "run_dir=r")
    assert code == 0
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[:-1] for line in lines] == [[*SSH, host] for host in ("a", "b")]
    remote = shlex.split(lines[1][-1])
    assert remote[: remote.index("-m")][-2] == "A=b"
    assert "--port=29999" in remote
    ranks = remote[remote.index("--") + 1 :]
    assert ranks == [f"--config-dir={tmp_path / 'mine'}", *SMALL, "run_dir='r'"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("slrum",),
            "launch: got 'slrum'; the launchers are local, slurm, hostfile; try launch slurm",
        ),
        (("local", "--dry-run", *SMALL), "there is no script to show"),
        (("local", "launcher.time=10", *SMALL), "launcher.time: got '10'; launcher=local does not"),
        (
            ("slurm", "launcher=local", *SMALL),
            "launcher: got 'local'; launch slurm starts ranks by",
        ),
        (("hostfile", *SMALL), "launcher.hostfile: got None; a file names the hosts"),
        (("hostfile", "launcher.hostfile=/none", *SMALL), "No such file"),
        (
            ("hostfile", "launcher.hostfile=hosts", "cluster=cpu", *SMALL),
            "launcher.ssh: got 'ssh'; a program of this machine, which reaches the hosts",
        ),
        (("slurm", "cluster=cpu", *SMALL), "squeue is one of Slurm's commands and is not on this"),
        (("local", "run_dir=/proc/run", *SMALL), "run_dir: got '/proc/run'; it must be writable"),
    ],
)
def test_what_cannot_start_is_one_line(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches processes started only to fail, and a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(command.local, "launch", lambda *_: pytest.fail("started"))
    code, out, err = _said(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_memory_that_does_not_fit_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches nodes that are rented to run out of memory, and a check that cannot be left out."""
    monkeypatch.chdir(tmp_path)
    tight = ("--dry-run", *SMALL, "cluster=h800", "cluster.memory_bytes=3e9")
    code, out, err = _said(capsys, "slurm", *tight)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "GPU memory of pipeline rank 0 on h800: got '3." in err
    assert "more than the 3 there are" in err
    code, out, err = _said(capsys, "slurm", *tight, "launcher.check_memory=false")
    assert (code, out.splitlines()[0], err) == (0, "#!/bin/bash", "")
    monkeypatch.setattr(command.local, "launch", lambda *_: pytest.fail("started"))
    code, _, err = _said(capsys, "local", *tight[1:])
    assert (code, err.count("\n")) == (2, 1)


def test_memory_of_what_has_no_plan_is_said_not_to_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run refused for what only a plan cannot do, and a check left out in silence."""
    monkeypatch.chdir(tmp_path)
    words = ("slurm", "--dry-run", *SMALL, "cluster=h800", "precision=fp64")
    code, out, err = _said(capsys, *words)
    assert (code, out.splitlines()[0]) == (0, "#!/bin/bash")
    assert err.startswith("kimi-pretrain: memory is not checked: precision: got 'fp64'")


def test_a_run_directory_in_use_is_refused_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second launch whose ranks meet only to be told so, or that mixes its rows."""
    monkeypatch.setattr(command.local, "launch", lambda *_: pytest.fail("started"))
    with hold_run_dir(tmp_path / "run"):
        code, _, err = _said(capsys, "local", *SMALL, f"run_dir={tmp_path / 'run'}")
    assert code == 2
    assert "another process is training in it" in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a word that only the source explains."""
    assert main(["launch", "--help"]) == 0
    assert "local|slurm|hostfile" in capsys.readouterr().out
    assert main(["launch"]) == 2
