"""The saved configuration: what a resume may change and what it may not."""

from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import require_same_run, save_config

OVERRIDES = ["experiment=smoke", "run_dir=somewhere"]


def test_a_resume_may_train_longer_and_log_elsewhere(tmp_path: Path) -> None:
    """Catches an identity so strict that a finished run cannot be prolonged."""
    path = tmp_path / "config.yaml"
    save_config(compose(OVERRIDES), path)
    require_same_run(compose([*OVERRIDES, "schedule.max_steps=999", "logging=jsonl"]), path)


@pytest.mark.parametrize(
    ("override", "key"),
    [("seed=1", "seed"), ("data.sequence_length=64", "data.sequence_length")],
)
def test_a_resume_must_be_the_same_run(tmp_path: Path, override: str, key: str) -> None:
    """Catches a resume that silently continues another run's data or weights."""
    path = tmp_path / "config.yaml"
    save_config(compose(OVERRIDES), path)
    with pytest.raises(ConfigError, match=key):
        require_same_run(compose([*OVERRIDES, override]), path)
