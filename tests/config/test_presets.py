"""The shipped YAML files: released models to the digit, every option composes, names agree."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.composition import conf_dir, group_options
from kimi_pretrain.plan.parameters import count_parameters

RELEASED = Path(__file__).parents[1] / "fixtures" / "released"

# What the released files say beyond our keys; the model relies on these values.
ASSUMED = {
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "seq_aux": True,
    "model_type": ("deepseek_v3", "kimi_k2"),
}
NOT_THE_MODEL = {
    "architectures",
    "auto_map",
    "ep_size",
    "num_key_value_heads",  # checked apart: MLA has one for each head
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
NEEDS_MORE = {"files": ["data.tokenizer.kind=bytes", "+data.domains.web.train=w"]}


@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("k2", "kimi_k2.json"),
        ("deepseek_v3", "deepseek_v3.json"),
        ("moonlight_16b", "moonlight_16b_a3b.json"),
    ],
)
def test_released_models_to_the_digit(option: str, file: str) -> None:
    """Catches a mistyped width, a forgotten key and a key we take for granted wrongly."""
    released: dict[str, Any] = json.loads((RELEASED / file).read_text())
    ours = asdict(compose([f"model={option}"]).model)
    if option == "deepseek_v3":
        assert released.pop("num_nextn_predict_layers") == 1  # said in the preset: left out
    for key, value in released.items():
        if key in ASSUMED:
            assert value == ASSUMED[key] or value in ASSUMED[key], key
        elif key not in NOT_THE_MODEL:
            assert ours[key] == value, key
    assert released["num_key_value_heads"] == ours["num_attention_heads"]
    assert ours["rope_scaling"] is None or "rope_scaling" in released


def test_k2_mini_has_about_a_hundred_million_parameters() -> None:
    """Catches a change of the dial's arithmetic that moves what docs and users rely on."""
    assert count_parameters(compose(["model=k2_mini"]).model).total == 93_780_864


def _options() -> list[tuple[str, str]]:
    return [(group, o) for group, options in group_options(conf_dir()).items() for o in options]


@pytest.mark.parametrize(("group", "option"), _options())
def test_every_shipped_option_composes(group: str, option: str) -> None:
    """Catches a YAML file with a stale key, a wrong type or a combination that cannot run."""
    overrides = [f"{group}={option}", *NEEDS_MORE.get(option, [])]
    if option == "k2_family":
        overrides.append("model.dial=3")
    if option == "files":
        overrides.append("data.mixture=[{weights: {web: 1}}]")
    config = compose(overrides)
    if group in ("model", "data", "cluster"):
        assert getattr(config, group).name == option
    if group == "experiment":
        assert config.experiment == option


def test_the_default_run_is_the_experiment_k2_nano_cpu() -> None:
    """Catches a preset that drifts from the default it names, but for what a plan must know."""
    named = asdict(compose(["experiment=k2_nano_cpu", "run_dir=x"]))
    default = asdict(compose(["run_dir=x"]))
    assert named.pop("experiment") == "k2_nano_cpu"
    assert default.pop("experiment") is None
    assert (named.pop("cluster")["name"], default.pop("cluster")["name"]) == ("cpu", "local")
    assert named == default


def test_a_choice_on_the_command_line_wins_over_the_experiment() -> None:
    """Catches an experiment whose values overwrite the group the user asked for."""
    config = compose(["experiment=smoke", "model=k2_nano", "schedule=nano"])
    assert config.model.name == "k2_nano"
    assert config.schedule == compose(["schedule=nano"]).schedule


def test_k2_schedule_counts_the_published_steps() -> None:
    """Catches a stage of K2's pretraining with a digit too many or too few."""
    schedule = compose(["schedule=k2", "data.sequence_length=4096"]).schedule
    step = schedule.global_batch_size * 4096
    assert step == 67_108_864
    steps = [stage.steps or round((stage.tokens or 0) / step) for stage in schedule.stages]
    assert steps == [500, 149_012, 81_956, 5_960]
    rates = [2e-4 * stage.to for stage in schedule.stages]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-5, 7e-6])
