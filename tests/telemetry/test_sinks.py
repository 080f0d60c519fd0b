import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config, LoggingConfig
from kimi_pretrain.telemetry import sinks
from kimi_pretrain.telemetry.jsonl import read_rows
from kimi_pretrain.telemetry.sinks import Sinks, check_sinks, open_sinks


def config(*names: str) -> Config:
    return Config(logging=LoggingConfig(sinks=list(names)))


class Recorder:
    def __init__(self, log: list[str], name: str, *, fails: bool = False) -> None:
        self._log, self._name, self._fails = log, name, fails

    def row(self, kind: str, values: dict[str, Any]) -> None:
        self._log.append(f"{self._name} {kind} {values['step']}")

    def close(self) -> None:
        self._log.append(f"{self._name} closed")
        if self._fails:
            raise OSError("disk full")


def test_the_files_are_written_without_being_asked_for(tmp_path: Path) -> None:
    with open_sinks(config(), tmp_path) as opened:
        opened.row("step", {"step": 1})
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [{"step": 1}]


def test_jsonl_named_explicitly_is_not_opened_twice(tmp_path: Path) -> None:
    with open_sinks(config("jsonl", "jsonl"), tmp_path) as opened:
        opened.row("step", {"step": 1})
    assert len(list(read_rows(tmp_path / "metrics.jsonl"))) == 1


def test_a_resume_records_each_step_once(tmp_path: Path) -> None:
    for finished, steps in ((0, range(1, 6)), (3, range(4, 8))):
        with open_sinks(config(), tmp_path, finished) as opened:
            for step in steps:
                opened.row("step", {"step": step, "tokens": step})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_rows_go_to_every_sink_and_all_are_closed_though_one_fails() -> None:
    """A failing sink that keeps another from writing its last rows."""
    log: list[str] = []
    both = Sinks([Recorder(log, "a", fails=True), Recorder(log, "b")])
    with pytest.raises(OSError, match="disk full"), both as opened:
        opened.row("step", {"step": 1})
    assert log == ["a step 1", "b step 1", "a closed", "b closed"]


def test_an_unknown_sink_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wandbb'.*logging\.sinks=\[wandb\]"):
        open_sinks(config("wandbb"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def absent(package: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(sinks, "find_spec", absent)
    with pytest.raises(ConfigError) as caught:
        open_sinks(config(name), tmp_path)
    assert f"pip install 'kimi_pretrain[{name}]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_sinks_of_the_extras_pass_the_check() -> None:
    check_sinks(config("jsonl", "wandb", "tensorboard"))


def test_watching_costs_no_heavy_import() -> None:
    """torch, matplotlib or rich paid for by a run that does not use them."""
    program = (
        "import sys\n"
        "from kimi_pretrain.telemetry import console, jsonl, report, scalars, sinks\n"
        "heavy = {'torch', 'matplotlib', 'rich', 'wandb', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
