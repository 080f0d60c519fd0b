"""Every mistake is one line of four parts, whatever Hydra makes of it."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config import compose
from kimi_pretrain.config.composition import compose_from
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.typed import dotted_keys

FOUR_PARTS = re.compile(r"^[^\n]+: got [^\n]+; [^\n]+; try [^\n]+$")

MISTAKES = {
    # wrong keys: the closest full name, with the value that was meant
    "schedule.max_step=3": "schedule.max_steps=3",
    "schedul.max_steps=3": "schedule.max_steps=3",
    "max_steps=3": "schedule.max_steps=3",
    "learning_rate=3e-4": "optimizer.lr=3e-4",
    "optimizer.learning_rate=3e-4": "optimizer.lr=3e-4",
    "model.n_routed_expert=8": "model.n_routed_experts=8",
    "+model.n_routed_expert=8": "model.n_routed_experts=8",
    "++presicion=fp32": "precision=fp32",
    "schedule.stages=[{nam: a, shape: linear, steps: 1}]": "schedule.stages.0.name=a",
    "+data.domains.web={trian: a}": "data.domains.web.train=a",
    "modell=k2": "model=k2",
    # wrong options of a group
    "model=k2_nanoo": "model=k2_nano",
    "optimizer=5": "optimizer=",
    "model=null": "model=",
    "experiment=smok": "experiment=smoke",
    # wrong types
    "schedule.max_steps=abc": "schedule.max_steps=1",
    "schedule.max_steps=1.5": "schedule.max_steps=2",
    "optimizer.lr=": "optimizer.lr=0.1",
    "optimizer.nesterov=maybe": "optimizer.nesterov=true",
    "optimizer.adam_betas=[0.9]": "optimizer.adam_betas=[..., ...]",
    "schedule.stages=3": "schedule.stages=[...]",
    "model.rope_scaling=5": "model.rope_scaling={...}",
    "seed=null": "seed=1",
    "model.dial=abc": "model.dial=4",
    "logging.sinks=wandb": "logging.sinks=[...]",
    # entries that are not there
    "data.domains.web.train=x": "+data.domains.web.train=x",
    "model.rope_scaling.factor=3": "'model.rope_scaling={factor: 3}'",
    "run_dir=???": "run_dir=...",
    "model=k2_family": "model.dial=4",
    "data=files": "data.tokenizer.kind=...",
    # interpolations and syntax
    "model.hidden_size=${nothing}": "model.hidden_size=VALUE",
    "run_dir=${oc.env:SURELY_UNSET}": "run_dir=VALUE",
    "run_dir=${run_dir}": "run_dir=VALUE",
    "optimizer.lr": "'KEY=VALUE'",
    "a b c": "'KEY=VALUE'",
    "optimizer.lr=[1": "'KEY=VALUE'",
    "=3": "'KEY=VALUE'",
    "": "'KEY=VALUE'",
    "seed=1,2": "-m seed=1,2",
    "hydra.foo=1": "hydra.foo=VALUE",
    "hydra/launcher=nope": "hydra/launcher=basic",
    "experiment=[1,2]": "experiment=",
    "~schedule": "schedule.global_batch_size=",
}


@pytest.mark.parametrize(("override", "fix"), MISTAKES.items())
def test_a_mistake_is_one_line_that_ends_with_the_fix(override: str, fix: str) -> None:
    """Catches a traceback, a second line, and an error that does not say what to type."""
    with pytest.raises(ConfigError) as error:
        compose([override])
    line = str(error.value)
    assert FOUR_PARTS.match(line), line
    assert f"; try {fix}" in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {hidden: 5}", "model.hidden: got 5; no such key; the closest is model.hidden_"),
        ("model: {hidden_size: abc}", "model.hidden_size: got 'abc'; it must be an integer"),
        ("defaults: [override /model: k2_nan]", "model: got 'k2_nan'; no such option"),
        ("schedule: {stages: [{shap: linear}]}", "schedule.stages.0.shap: got 'linear'; no such"),
        ("model: {hidden_size: [", "mine.yaml:"),
    ],
)
def test_a_mistake_in_a_file_reads_the_same(tmp_path: Path, text: str, line: str) -> None:
    """Catches errors that are good for overrides only."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError) as error:
        compose_from(["experiment=mine"], "config", [tmp_path])
    assert FOUR_PARTS.match(str(error.value)), str(error.value)
    assert line in str(error.value)


KEYS = [*dotted_keys(Config), "model", "data", "+data.domains.a", "~schedule", "hydra.run.dir"]
VALUES = ["", "3", "-1", "1e400", "nan", "null", "true", "[]", "[1,2]", "{a: b}", "${seed}", "a,b"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(KEYS),
    st.sampled_from(VALUES) | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
)
def test_no_override_escapes_as_another_exception(key: str, value: str) -> None:
    """Catches whatever Hydra, OmegaConf, YAML or a rule raises that is not our one line."""
    line = None
    try:
        compose([f"{key}={value}"])
    except ConfigError as error:
        line = str(error)
    assert line is None or FOUR_PARTS.match(line), line
