"""A preset from somebody else cannot make Hydra call what it names."""

from pathlib import Path

import pytest

from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError

CODE = "a configuration names no code"


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.a._target_=os.getcwd",
        "hydra.launcher._target_=os.getcwd",
        "hydra.sweeper._target_=os.getcwd",
        "+hydra.hydra_logging.handlers.a={class: os.getcwd}",
    ],
)
def test_code_in_an_override_is_refused(override: str) -> None:
    """Catches the places of Hydra's own configuration that import and call a name."""
    with pytest.raises(ConfigError, match=CODE):
        compose([override])


@pytest.mark.parametrize("flags", [[], ["-m"], ["--cfg", "job"], ["--info"], ["--help"]])
def test_code_in_a_preset_is_refused_whatever_is_asked(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a shared preset that runs on being shown: Hydra sets up logging to print."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text(
        "# @package _global_\nhydra:\n  hydra_logging:\n    formatters:\n"
        "      a: {(): pathlib.Path.touch, self: touched}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-cd", str(tmp_path), "experiment=evil", *flags]) == 2
    assert CODE in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("override", ["+optimizer._target_=os.getcwd", "+_target_=os.getcwd"])
def test_our_keys_have_no_place_for_code(override: str) -> None:
    """Catches a ``_target_`` that slips into a group and waits for somebody to instantiate it."""
    with pytest.raises(ConfigError, match="no such key"):
        compose([override])


def test_hydras_own_launchers_and_plugins_pass() -> None:
    """Catches a rule that refuses what Hydra itself puts there."""
    compose(["hydra/launcher=basic", "hydra/sweeper=basic"])
