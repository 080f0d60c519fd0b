"""`kimi-pretrain plan --dry-run` as a person uses it."""

import json
from dataclasses import replace

import pytest

from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.dry_run import commands
from kimi_pretrain.dry_run.compare import Row, compare
from kimi_pretrain.dry_run.rank import dry_run_rank
from kimi_pretrain.plan.run_plan import plan_run

NANO = ["plan", "--dry-run", "experiment=k2_nano_cpu", "cluster=cpu"]


def test_it_prints_every_rank_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that is not found, a rank left out, or one that does not exist."""
    assert main([*NANO, "parallel.dp=2", "parallel.ep=2", "schedule.global_batch_size=16"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("dry run of k2_nano on 2 ranks")
    assert "\nrank 0: edp 0, pp 0, ep 0" in text
    assert "\nrank 1: edp 0, pp 0, ep 1" in text
    assert text.count("\nrank ") == 2
    assert "DIFFERS" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches text around what a program reads, and a rank that was asked for twice."""
    assert main([*NANO, "--json", "--ranks", "0,last"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in data["ranks"]] == [0]
    assert all(row["agrees"] for row in data["ranks"][0]["rows"])


def test_a_difference_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check in CI that passes whatever was counted."""
    monkeypatch.setattr(commands, "compare", lambda plan, run: [Row("bytes", 102.0, 100.0)])
    assert main(NANO) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counted", "bound", "agrees"),
    [(101, False, True), (98, False, False), (98, True, True), (102, True, False)],
)
def test_a_row_agrees_to_a_percent(counted: int, bound: bool, agrees: bool) -> None:
    """Catches a bound that is exceeded, or a quantity that may be anything below the plan."""
    assert Row("bytes", counted, 100, bound).agrees is agrees
    assert not Row("bytes", 1, 0).agrees


def test_a_stage_without_a_count_is_a_difference() -> None:
    """Catches a stage that was not looked at and whose row is left out."""
    config = compose([*NANO[2:], "parallel.pp=2", "parallel.schedule=1f1b"])
    plan, run = plan_run(config), dry_run_rank(config, 1)
    assert all(row.agrees for row in compare(plan, run))
    differing = [row for row in compare(plan, replace(run, kept={})) if not row.agrees]
    assert [row.what for row in differing] == ["a microbatch keeps, stage 1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry-run", "--ranks", "0,5", "cluster=cpu"], "got '5'"),
        (["--dry-run", "--ranks", "first", "cluster=cpu"], "got 'first'"),
        (["--dry-run", "--html", "x.html", "cluster=cpu"], "--html"),
        (["--ranks", "0", "cluster=cpu"], "--dry-run"),
        (["--dry-run", "cluster=cpu", "schedule.global_batch_size=3", "parallel.dp=2"], "batch"),
        (["--dry-run"], "cluster=h800"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or a run of something else than was asked for."""
    assert main(["plan", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert says in output.err
    assert output.err.count("\n") == 1


def test_deepep_is_replaced_and_said() -> None:
    """Catches a dry run that looks for DeepEP's kernels, or does not say what it ran instead."""
    config, notes = commands.runnable(compose(["experiment=k2_1t_h800_2048"]))
    assert config.parallel.dispatcher == "all_to_all"
    assert len(notes) == 1
    assert commands.runnable(config) == (config, [])
