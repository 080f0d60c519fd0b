"""The command line as a person uses it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "kimi_pretrain"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT | environment,
    )


class Trained(list[Config]):
    """The configurations that reached the loop; ``outcomes`` are what it answers in turn."""

    outcomes: list[int | Exception]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Trained]:
    """The training loop replaced by a list, in an empty working directory."""
    trained = Trained()
    trained.outcomes = []

    def train(config: Config) -> int:
        trained.append(config)
        outcome = trained.outcomes.pop(0) if trained.outcomes else 0
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    loop = ModuleType("kimi_pretrain.train.loop")
    loop.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kimi_pretrain.train.loop", loop)
    monkeypatch.chdir(tmp_path)
    yield trained
    assert "HYDRA_FULL_ERROR" not in os.environ


# --- before any command -------------------------------------------------------------------


def _seconds(program: str, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of CPU of a Python program: on a quiet machine it takes no longer than that."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=folder,
    )
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, done


def test_help_is_instant_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """Catches an import at the top of the command line that every call would pay for."""
    program = (
        "import sys; from kimi_pretrain.cli import main; main(['--help']);"
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'rich', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    seconds, done = _seconds(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert seconds < 1


def test_a_wrong_key_is_one_line_in_under_two_seconds(tmp_path: Path) -> None:
    """Catches a traceback, a wrong exit code, files left behind, and an import of torch."""
    program = (
        "import sys; from kimi_pretrain.cli import main;"
        "code = main(['train', 'schedule.max_step=3', 'run_dir=here']);"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    seconds, done = _seconds(program, tmp_path)
    assert seconds < 2
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "kimi-pretrain: schedule.max_step: got '3'; no such key; the closest is "
        "schedule.max_steps; try schedule.max_steps=3\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "usage"),
        (["trian"], 2, "try train"),
        (["report"], 2, "usage"),
        (["report", "nowhere"], 2, "metrics.jsonl"),
        (["train", "--experimental-rerun", "x.pickle"], 2, "pickle"),
        (["train", "--config-path", "/etc"], 2, "--config-dir=/etc"),
        (["train", "--config-dir", "/nowhere"], 2, "/nowhere"),
        (["train", "--config-name", "nowhere"], 2, "--config-name=config"),
        (["train", "-m", "seed=1,2", "model=k2_nan"], 2, "model=k2_nano"),
        (["train", "--cfg", "job", "modle=k2"], 2, "model=k2"),
        (["train", "model.n_routed_experts=7", "model.n_group=2"], 2, "=8"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a flag or command whose misuse ends in a traceback or in success."""
    assert main(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert says in output.err
    assert "usage" in output.err or output.err.count("\n") == 1


def test_the_module_is_the_program() -> None:
    """Catches ``python -m kimi_pretrain`` differing from the installed command."""
    from kimi_pretrain import __version__

    assert run("--version").stdout == f"kimi_pretrain {__version__}\n"


# --- train: Hydra's conventions -----------------------------------------------------------


def test_train_without_arguments_is_the_default_run(trained: Trained, tmp_path: Path) -> None:
    """Catches overrides invented on the way, and files of Hydra's own around a run."""
    assert main(["train"]) == 0
    (config,) = trained
    assert config.model.name == "k2_nano"
    assert config.run_dir.startswith("runs/")
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_the_loop(trained: Trained) -> None:
    """Catches a command line that composes something else than ``compose`` does."""
    overrides = ["model=k2_micro", "schedule.max_steps=3", "run_dir=here", "logging=jsonl"]
    assert main(["train", *overrides]) == 0
    assert trained == [compose(overrides)]


def test_cfg_job_prints_what_would_run(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a printed configuration that is not the one that trains."""
    assert main(["train", "--cfg", "job", "--resolve", "seed=5", "run_dir=x"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 5
    assert printed["model"]["hidden_size"] == compose([]).model.hidden_size
    assert trained == []


@pytest.mark.parametrize("flags", [["--help"], ["--hydra-help"], ["--info", "all"]])
def test_what_hydra_shows(
    flags: list[str], trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a flag of Hydra's that our checks break or that starts training."""
    try:
        code = main(["train", *flags])
    except SystemExit as end:  # Hydra's way of ending a help page
        code = int(end.code or 0)
    assert code == 0
    assert "k2_nano" in capsys.readouterr().out or flags == ["--hydra-help"]
    assert trained == []


def test_config_dir_adds_presets(trained: Trained, tmp_path: Path) -> None:
    """Catches a folder of one's own that the check sees and the run does not, or the reverse."""
    (tmp_path / "my own" / "experiment").mkdir(parents=True)
    (tmp_path / "my own" / "experiment" / "tiny.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: k2_micro]\nexperiment: tiny\n"
    )
    assert main(["train", "-cd", str(tmp_path / "my own"), "experiment=tiny"]) == 0
    assert (trained[0].model.name, trained[0].experiment) == ("k2_micro", "tiny")


def test_config_name_chooses_another_primary_file(trained: Trained, tmp_path: Path) -> None:
    """Catches -cn that only the check or only the run obeys."""
    (tmp_path / "my own").mkdir()
    (tmp_path / "my own" / "own.yaml").write_text("defaults: [config, _self_]\nseed: 12\n")
    assert main(["train", "-cd", str(tmp_path / "my own"), "-cn", "own"]) == 0
    assert trained[0].seed == 12


# --- train: sweeps ------------------------------------------------------------------------


def test_each_job_of_a_sweep_has_its_own_directory(trained: Trained, tmp_path: Path) -> None:
    """Catches the second job resuming from the first one's checkpoints."""
    assert main(["train", "-m", "seed=1,2", "optimizer=muonclip,adamw"]) == 0
    chosen = [(config.seed, config.optimizer.name) for config in trained]
    assert chosen == [(1, "muonclip"), (1, "adamw"), (2, "muonclip"), (2, "adamw")]
    assert len({config.run_dir for config in trained}) == 4
    (sweep,) = (tmp_path / "runs").iterdir()
    assert {Path(config.run_dir).parent.name for config in trained} == {sweep.name}


def test_a_sweep_keeps_the_run_directories_it_was_given(trained: Trained) -> None:
    """Catches a run_dir of the user's that the sweep overwrites."""
    assert main(["train", "-m", "seed=1,2", "run_dir=here/${seed}"]) == 0
    assert [config.run_dir for config in trained] == ["here/1", "here/2"]


def test_a_sweep_into_one_directory_is_refused(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches jobs that would resume from each other."""
    assert main(["train", "-m", "seed=1,2", "run_dir=here"]) == 2
    assert "hydra.sweep.dir=here" in capsys.readouterr().err
    assert trained == []


def test_the_last_job_of_a_sweep_is_checked_before_the_first_starts(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a typing error found after hours of earlier jobs, and debris of the attempt."""
    assert (
        main(["train", "-m", "schedule.global_batch_size=16", "schedule.micro_batch_size=8,16,7"])
        == 2
    )
    assert "schedule.global_batch_size=21" in capsys.readouterr().err
    assert trained == []
    assert list(tmp_path.iterdir()) == []


def test_a_secret_in_a_sweep_is_refused_before_anything_is_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches Hydra's multirun.yaml, which records the overrides of a sweep."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert main(["train", "-m", "seed=1,2", "logging.wandb_project=${oc.env:WANDB_API_KEY}"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert main(["train", "-m", "seed=1,2"]) == 0
    written = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert written
    assert not any("0123456789abcdef" in f.read_text() for f in written)


# --- train: exit codes --------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3, 4, 75])
def test_the_loops_exit_code_is_the_programs(trained: Trained, code: int) -> None:
    """Catches Hydra's habit of ignoring what the job returns."""
    trained.outcomes = [code]
    assert main(["train"]) == code


def test_a_refusal_by_the_loop_is_one_line(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches Hydra's own lines around an error that only data or a run directory can show."""
    trained.outcomes = [ConfigError("run_dir", "x", "it belongs to another run", "another one")]
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "kimi-pretrain: run_dir: got 'x'; it belongs to another run; try another one\n"
    )


def test_a_defect_of_the_program_is_not_blamed_on_the_configuration(trained: Trained) -> None:
    """Catches a ValueError from inside training that is reported as a bad override."""
    trained.outcomes = [ValueError("a defect")]
    with pytest.raises(ValueError, match="a defect"):
        main(["train"])


def test_a_signal_ends_a_sweep_and_a_guard_does_not(trained: Trained) -> None:
    """Catches a sweep that goes on after Ctrl-C, and one that a bad job cuts short."""
    trained.outcomes = [75]
    assert main(["train", "-m", "seed=1,2"]) == 75
    assert len(trained) == 1
    trained.clear()
    trained.outcomes = [3, 0]
    assert main(["train", "-m", "seed=1,2"]) == 3
    assert len(trained) == 2


# --- completion ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("kimi-pretrain ", {"train", "data", "plan", "ckpt", "report"}),
        ("kimi-pretrain tr", {"train"}),
        ("kimi-pretrain train model=k2_n", {"model=k2_nano"}),
        ("kimi-pretrain train model=k2_nano schedule.max_", {"schedule.max_steps="}),
        ("kimi-pretrain train exp", {"experiment="}),
        ("kimi-pretrain train -m optimizer=", {"optimizer=adamw", "optimizer=muonclip"}),
    ],
)
def test_completion_query(
    line: str,
    offers: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches completion that breaks on the word ``train`` before Hydra's arguments."""
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert offers <= set(capsys.readouterr().out.split())


def test_bash_completes_the_installed_program(tmp_path: Path) -> None:
    """Catches an installed completion that never calls the program, or under a wrong name."""
    program = tmp_path / "kimi-pretrain"
    program.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(kimi-pretrain train --shell-completion install=bash)"
        complete -p kimi-pretrain | grep -q hydra_bash_completion || exit 1
        COMP_LINE='kimi-pretrain train model=moon' COMP_POINT=30 COMP_CWORD=2
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout.strip() == "model=moonlight_16b", done.stderr
