"""Override strings to a checked, typed configuration."""

import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from kimi_pretrain.config import compose
from kimi_pretrain.config.composition import compose_from, conf_dir
from kimi_pretrain.config.schema import Config, DomainConfig, RopeScalingConfig, StageConfig


def test_the_result_is_dataclasses_all_the_way() -> None:
    """Catches plain dicts or lists where the program expects the schema's types."""
    config = compose(["model=k2"])
    assert isinstance(config, Config)
    assert isinstance(config.schedule.stages[0], StageConfig)
    assert isinstance(config.model.rope_scaling, RopeScalingConfig)
    assert config.optimizer.adam_betas == (0.9, 0.95)
    assert isinstance(config.optimizer.adam_betas, tuple)


def test_hydras_override_grammar() -> None:
    """Catches a composition that takes only simple KEY=VALUE."""
    config = compose(
        [
            "schedule.stages.0.steps=7",
            "model.rope_scaling={factor: 4, beta_fast: 16}",
            "data.mixture=[{weights: {code: 1}, tokens: 1000}, {weights: {code: 1, math: 2}}]",
            "optimizer.qk_clip_threshold=null",
            "run_dir=a/${model.name}/${seed}",
            "++seed=5",
        ]
    )
    assert config.schedule.stages[0].steps == 7
    assert config.model.rope_scaling == RopeScalingConfig(factor=4.0, beta_fast=16.0)
    assert [stage.tokens for stage in config.data.mixture] == [1000, None]
    assert config.optimizer.qk_clip_threshold is None
    assert config.run_dir == "a/k2_nano/5"


@pytest.mark.parametrize("override", ["+data.domains.web.train=w", "+data.domains.web={train: w}"])
def test_own_domains_from_the_command_line(override: str) -> None:
    """Catches a dict of groups that cannot be extended without writing a file."""
    config = compose(
        ["data=files", "data.tokenizer.kind=bytes", override, "data.mixture=[{weights: {web: 1}}]"]
    )
    assert config.data.domains == {"web": DomainConfig(train="w")}


def test_own_presets_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    """Catches --config-dir that finds nothing, or needs the files inside the package."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: k2_micro]\nseed: 9\n"
    )
    config = compose_from(["experiment=mine"], "config", [tmp_path])
    assert (config.model.name, config.seed) == ("k2_micro", 9)


def test_composing_inside_a_hydra_application() -> None:
    """Catches a composition that fails in, or breaks, the Hydra job it is called from."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert compose(["seed=3"]).seed == 3
        assert GlobalHydra.instance().hydra is running
    assert not GlobalHydra.instance().is_initialized()


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches corpora written to a place the user has set otherwise, and a need for HOME."""
    for name in ("KIMI_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/anywhere")
    assert compose([]).data.root == "/anywhere/.cache/kimi_pretrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert compose([]).data.root == "/cache/kimi_pretrain"
    monkeypatch.delenv("HOME")  # as in a batch job or a container
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compose(["data=smoke"]).data.root == "~/.cache/kimi_pretrain"
    monkeypatch.setenv("KIMI_DATA", "/data")
    assert {compose([f"data={name}"]).data.root for name in ("default", "smoke")} == {"/data"}


def test_composing_never_imports_torch() -> None:
    """Catches an import that makes a mistyped key wait for torch (seconds on a cold disk)."""
    program = (
        "import sys; from kimi_pretrain.config import compose; compose([]); "
        "sys.exit(any(m.split('.')[0] in ('torch', 'numpy', 'tokenizers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_types_do_not_import_hydra() -> None:
    """Catches a schema import that pays for composing: every room reads the schema."""
    program = "import sys, kimi_pretrain.config.schema; sys.exit('hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
