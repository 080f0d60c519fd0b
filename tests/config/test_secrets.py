"""Secrets do not enter a configuration, on any of the three ways in."""

from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.composition import compose_from
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import save_config
from kimi_pretrain.config.secrets import masked

SECRET = "0123456789abcdef"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET[::-1])
    monkeypatch.setenv("CHOSEN", "WANDB_API_KEY")
    monkeypatch.setenv("CORPUS", "/somewhere")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/cache/tiktoken")


@pytest.mark.parametrize(
    "override",
    [
        "logging.wandb_project=${oc.env:WANDB_API_KEY}",
        "logging.wandb_project=${oc.env:'WANDB_API_KEY'}",
        "logging.wandb_project=${oc.env:HF_TOKEN,none}",
        "logging.wandb_project=${oc.env:UNSET_API_KEY,none}",
        "run_dir=runs/${oc.env:WANDB_API_KEY}",
        "run_dir='${oc.env:${oc.env:CHOSEN}}'",
        f"logging.wandb_project={SECRET}",
        f"run_dir=a{SECRET}b",
        f"+logging.wandb_api_key={SECRET}",
        "+logging.api_key=something",
        "+hf_token=something",
        "+wandb.password=something",
    ],
)
def test_a_secret_is_refused_and_not_printed(override: str) -> None:
    """Catches a key that would be saved with the run, uploaded with it, or echoed in the error."""
    with pytest.raises(ConfigError, match=r"\*\*\*") as error:
        compose([override])
    assert SECRET not in str(error.value)
    assert SECRET[::-1] not in str(error.value)


def test_a_secret_in_a_file_is_refused(tmp_path: Path) -> None:
    """Catches a preset that reads a secret: files are resolved like overrides."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nlogging:\n  wandb_project: ${oc.env:WANDB_API_KEY}\n"
    )
    with pytest.raises(ConfigError, match=r"logging\.wandb_project.*WANDB_API_KEY"):
        compose_from(["experiment=mine"], "config", [tmp_path])


@pytest.mark.parametrize(
    "override",
    ["data.root=${oc.env:CORPUS}", "data.root=/cache/tiktoken", "schedule.sample_tokens=3"],
)
def test_what_only_looks_like_a_secret_is_not_refused(override: str) -> None:
    """Catches a check that takes every *token* for a secret."""
    compose([override])


def test_the_saved_configuration_holds_nothing_of_the_environment(tmp_path: Path) -> None:
    """Catches environment variables written beside the run."""
    save_config(compose(["logging=wandb"]), tmp_path / "config.yaml")
    saved = (tmp_path / "config.yaml").read_text()
    assert SECRET not in saved
    assert SECRET[::-1] not in saved


def test_a_text_for_others_holds_no_secret() -> None:
    """Catches a bug report with a key in it, half a key left where one contains another, and
    short values masked wherever they occur."""
    environ = {"A_TOKEN": SECRET, "B_KEY": SECRET + "-longer", "C_SECRET": "1", "PATH": "/usr/bin"}
    text = f"{SECRET}-longer, {SECRET}, 1, /usr/bin"
    assert masked(text, environ) == "***, ***, 1, /usr/bin"
