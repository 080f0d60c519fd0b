"""Each impossible combination is refused, with the nearest one that is possible."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config, DomainConfig, RopeScalingConfig
from kimi_pretrain.config.validate import validate, validate_model, validate_training


@pytest.fixture(scope="module")
def good() -> Config:
    return compose(["run_dir=x"])


IN_ONE_GROUP: list[tuple[str, dict[str, Any], str, str]] = [
    # model: sizes
    ("model", {"vocab_size": 0}, "model.vocab_size", "model.vocab_size=1"),
    ("model", {"num_attention_heads": 0}, "model.num_attention_heads", "=1"),
    ("model", {"num_hidden_layers": -1}, "model.num_hidden_layers", "=1"),
    ("model", {"q_lora_rank": 0}, "model.q_lora_rank", "=1"),
    ("model", {"n_shared_experts": 0}, "model.n_shared_experts", "=1"),
    ("model", {"first_k_dense_replace": 5}, "model.first_k_dense_replace", "=4"),
    ("model", {"first_k_dense_replace": -1}, "model.first_k_dense_replace", "=0"),
    ("model", {"rms_norm_eps": 0.0}, "model.rms_norm_eps", "=1e-6"),
    ("model", {"initializer_range": -0.1}, "model.initializer_range", "=0"),
    # model: attention
    ("model", {"qk_rope_head_dim": 15}, "model.qk_rope_head_dim", "=16"),
    ("model", {"v_head_dim": 100}, "model.v_head_dim", "=24"),
    ("model", {"rope_theta": 1.0}, "model.rope_theta", "=50000"),
    ("model", {"rope_scaling": RopeScalingConfig("linear", 2)}, "model.rope_scaling.type", "=yarn"),
    ("model", {"rope_scaling": RopeScalingConfig(factor=0.5)}, "model.rope_scaling.factor", "=1"),
    (
        "model",
        {"rope_scaling": RopeScalingConfig(factor=2, beta_fast=1, beta_slow=2)},
        "model.rope_scaling.beta_fast",
        "=2",
    ),
    # model: router
    ("model", {"n_group": 5}, "model.n_routed_experts", "=100"),
    ("model", {"n_group": 96, "topk_group": 96}, "model.n_group", "=48"),
    ("model", {"n_group": 4, "topk_group": 5}, "model.topk_group", "=4"),
    ("model", {"num_experts_per_tok": 97}, "model.num_experts_per_tok", "=96"),
    (
        "model",
        {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 13},
        "model.num_experts_per_tok",
        "=12",
    ),
    ("model", {"routed_scaling_factor": 0.0}, "model.routed_scaling_factor", "=2.827"),
    ("model", {"aux_loss_alpha": -1.0}, "model.aux_loss_alpha", "=0"),
    # model: what the family is not
    ("model", {"scoring_func": "softmax"}, "model.scoring_func", "=sigmoid"),
    ("model", {"topk_method": "greedy"}, "model.topk_method", "=noaux_tc"),
    ("model", {"hidden_act": "gelu"}, "model.hidden_act", "=silu"),
    ("model", {"attention_bias": True}, "model.attention_bias", "=false"),
    ("model", {"tie_word_embeddings": True}, "model.tie_word_embeddings", "=false"),
    ("model", {"num_nextn_predict_layers": 1}, "model.num_nextn_predict_layers", "=0"),
    # optimizer
    ("optimizer", {"name": "moun"}, "optimizer.name", "=muonclip"),
    ("optimizer", {"ns_coefficients": "keler5"}, "optimizer.ns_coefficients", "=keller5"),
    ("optimizer", {"lr": -1e-3}, "optimizer.lr", "=0"),
    ("optimizer", {"lr": float("nan")}, "optimizer.lr", "=1.0"),
    ("optimizer", {"weight_decay": float("inf")}, "optimizer.weight_decay", "=1.0"),
    ("optimizer", {"weight_decay": -0.1}, "optimizer.weight_decay", "=0"),
    ("optimizer", {"momentum": 1.0}, "optimizer.momentum", "=0.95"),
    ("optimizer", {"adam_betas": (0.9, 1.0)}, "optimizer.adam_betas", "=[0.9,0.95]"),
    ("optimizer", {"adam_eps": 0.0}, "optimizer.adam_eps", "=1e-8"),
    ("optimizer", {"update_rms": 0.0}, "optimizer.update_rms", "=0.2"),
    ("optimizer", {"qk_clip_threshold": 0.0}, "optimizer.qk_clip_threshold", "=100, or null"),
    ("optimizer", {"grad_clip": -1.0}, "optimizer.grad_clip", "=1, or null"),
    ("optimizer", {"router_bias_rate": -1.0}, "optimizer.router_bias_rate", "=0"),
    # schedule
    ("schedule", {"global_batch_size": 0}, "schedule.global_batch_size", "=1"),
    ("schedule", {"micro_batch_size": 0}, "schedule.micro_batch_size", "=1"),
    ("schedule", {"global_batch_size": 20}, "schedule.global_batch_size", "=24"),
    ("schedule", {"max_steps": 0}, "schedule.max_steps", "=1"),
    ("schedule", {"stages": []}, "schedule.stages", "=[{name: all"),
    ("schedule", {"eval_interval": -1}, "schedule.eval_interval", "=0"),
    ("schedule", {"keep_checkpoints": 0}, "schedule.keep_checkpoints", "=1"),
    # data
    ("data", {"sequence_length": 0}, "data.sequence_length", "=1"),
    ("data", {"sequence_length": 8192}, "data.sequence_length", "=4096"),
    ("data", {"recipe": "defualt"}, "data.recipe", "=default"),
    ("data", {"recipe": None}, "data.domains", "data=default"),
    ("data", {"domains": {"web": DomainConfig("w")}}, "data.domains", "data=files"),
    # the rest
    ("cluster", {"peak_flops": 0.0}, "cluster.peak_flops", "=989e12"),
    ("logging", {"sinks": ["wandbb"]}, "logging.sinks", "=wandb"),
    ("logging", {"console": "fancy"}, "logging.console", "="),
    ("logging", {"wandb_mode": "onlin"}, "logging.wandb_mode", "=online"),
    ("logging", {"console_interval": 0}, "logging.console_interval", "=1"),
    ("logging", {"layer_interval": 0}, "logging.layer_interval", "=1"),
    ("logging", {"trace_step": 0}, "logging.trace_step", "=1"),
    ("parallel", {"dp": 0}, "parallel.dp", "parallel.dp=1"),
    ("parallel", {"dp": 6, "ep": 4}, "parallel.dp", "parallel.dp=8"),
    ("parallel", {"dp": 5, "ep": 5}, "parallel.ep", "parallel.ep=4"),
    ("parallel", {"dp": 1, "ep": 5}, "parallel.ep", "parallel.ep=4"),
    ("parallel", {"schedule": "interleaved"}, "parallel.schedule", "=interleaved_1f1b"),
    ("parallel", {"weight_grads_held": -1}, "parallel.weight_grads_held", "=0"),
    ("parallel", {"layer_split": "evn"}, "parallel.layer_split", "=even"),
    ("parallel", {"dense_sharding": "flatt"}, "parallel.dense_sharding", "=flat"),
    ("parallel", {"router_weights": "before"}, "parallel.router_weights", "=before_down"),
    ("parallel", {"dispatcher": "deep_ep"}, "parallel.dispatcher", "=deepep"),
    ("parallel", {"dispatcher": "deepep"}, "parallel.router_weights", "=before_down"),
    ("parallel", {"bucket_elements": 0}, "parallel.bucket_elements", "=1"),
    ("parallel", {"timeout_seconds": 0.0}, "parallel.timeout_seconds", "=600"),
    ("activation", {"policy": "k3"}, "activation.policy", "activation.policy=k2"),
    ("activation", {"tags": {"norm_out": "keep"}}, "activation.tags", "activation.policy=custom"),
    (
        "activation",
        {"policy": "custom", "tags": {"norm_outt": "keep"}},
        "activation.tags",
        "activation.tags.norm_out=keep",
    ),
    (
        "activation",
        {"policy": "custom", "tags": {"norm_in": "recompute"}},
        "activation.tags.norm_in",
        "activation.tags.norm_in=",
    ),
    ("activation", {"ahead": True}, "activation.ahead", "activation=k2"),
    ("activation", {"host_bytes": 0}, "activation.host_bytes", "activation.host_bytes=1"),
]

ONLY_PLANNED: list[tuple[str, dict[str, Any], str, str]] = [
    ("parallel", {"pp": 2}, "parallel.schedule", "parallel.schedule=k2"),
    ("parallel", {"vpp": 2}, "parallel.schedule", "parallel.schedule=k2"),
    ("parallel", {"dp": 3}, "schedule.global_batch_size", "schedule.global_batch_size=9"),
    ("parallel", {"dp": 2}, "schedule.micro_batch_size", "schedule.micro_batch_size=4"),
]


@pytest.mark.parametrize(("group", "change", "what", "fix"), IN_ONE_GROUP)
def test_a_group_that_cannot_run(
    good: Config, group: str, change: dict[str, Any], what: str, fix: str
) -> None:
    """Catches a combination that would fail later, train wrongly, or divide by zero."""
    bad = replace(good, **{group: replace(getattr(good, group), **change)})
    _refused(bad, what, fix)


@pytest.mark.parametrize(("group", "change", "what", "fix"), ONLY_PLANNED)
def test_what_can_be_planned_but_not_trained(
    good: Config, group: str, change: dict[str, Any], what: str, fix: str
) -> None:
    """Catches a run of what this version does not have, or a batch that ranks cannot share."""
    bad = replace(good, **{group: replace(getattr(good, group), **change)})
    validate(bad)
    _refused(bad, what, fix, validate_training)


def _stage(good: Config, **change: Any) -> Config:
    stages = [replace(good.schedule.stages[0], **change), *good.schedule.stages[1:]]
    return replace(good, schedule=replace(good.schedule, stages=stages))


def _mixture(good: Config, *changes: dict[str, Any]) -> Config:
    mixture = [replace(good.data.mixture[0], **change) for change in changes]
    return replace(good, data=replace(good.data, mixture=mixture))


def _tokenizer(good: Config, **change: Any) -> Config:
    tokenizer = replace(good.data.tokenizer, **change)
    return replace(good, data=replace(good.data, tokenizer=tokenizer))


DEEPER: dict[str, tuple[Callable[[Config], Config], str, str]] = {
    "both units": (lambda c: _stage(c, tokens=10), "schedule.stages.0", "steps: 10}"),
    "no unit": (lambda c: _stage(c, steps=None), "schedule.stages.0", "steps: 10}"),
    "no steps": (lambda c: _stage(c, steps=0), "schedule.stages.0.steps", "=1"),
    "shape": (lambda c: _stage(c, shape="cosin"), "schedule.stages.0.shape", "=cosine"),
    "negative end": (lambda c: _stage(c, to=-0.1), "schedule.stages.0.to", "=0"),
    "less than a step": (
        lambda c: _stage(c, steps=None, tokens=4095),
        "schedule.stages.0.tokens",
        "=4096",
    ),
    "unknown domain": (
        lambda c: _mixture(c, {"weights": {"cod": 1.0}}),
        "data.mixture.0.weights",
        "=code",
    ),
    "negative weight": (
        lambda c: _mixture(c, {"weights": {"code": -1.0, "math": 2.0}}),
        "data.mixture.0.weights.code",
        "=0",
    ),
    "all weights zero": (
        lambda c: _mixture(c, {"weights": {"code": 0.0}}),
        "data.mixture.0.weights",
        "={code: 1.0}",
    ),
    "no weights": (lambda c: _mixture(c, {"weights": {}}), "data.mixture.0.weights", "={code"),
    "weight not a number": (
        lambda c: _mixture(c, {"weights": {"code": float("nan")}}),
        "data.mixture.0.weights.code",
        "=1.0",
    ),
    "endless first stage": (lambda c: _mixture(c, {}, {}), "data.mixture.0.tokens", "=1000000"),
    "empty stage": (lambda c: _mixture(c, {"tokens": 0}), "data.mixture.0.tokens", "=1"),
    "unknown tokenizer": (lambda c: _tokenizer(c, kind="bp"), "data.tokenizer.kind", "=bpe"),
    "no file": (lambda c: _tokenizer(c, kind="tiktoken"), "data.tokenizer.path", "=/where"),
    "too few ids": (lambda c: _tokenizer(c, vocab_size=256), "data.tokenizer.vocab_size", "=257"),
    "more ids than embeddings": (
        lambda c: _tokenizer(c, vocab_size=4097),
        "model.vocab_size",
        "=4097",
    ),
    "precision": (lambda c: replace(c, precision="fp16"), "precision", "=fp"),
    "kernels": (lambda c: replace(c, kernels="cuda"), "kernels", "="),
    "native_fp64": (
        lambda c: replace(c, kernels="native", precision="fp64"),
        "kernels",
        "=auto",
    ),
    "seed": (lambda c: replace(c, seed=-1), "seed", "=0"),
    "run_dir": (lambda c: replace(c, run_dir=" "), "run_dir", "runs/"),
}


@pytest.mark.parametrize("case", DEEPER)
def test_a_stage_a_tokenizer_or_a_pair_of_groups_that_cannot_run(good: Config, case: str) -> None:
    """Catches what only nested values or two groups together show to be wrong."""
    change, what, fix = DEEPER[case]
    _refused(change(good), what, fix)


def _refused(bad: Config, what: str, fix: str, check: Callable[[Config], None] = validate) -> None:
    with pytest.raises(ConfigError) as error:
        check(bad)
    assert error.value.what == what
    assert fix in error.value.fix
    assert "\n" not in str(error.value)


def test_a_released_model_is_valid_by_itself() -> None:
    """Catches rules so strict that the family's own models break them."""
    for option in ("k2", "deepseek_v3", "moonlight_16b"):
        validate_model(compose([f"model={option}"]).model)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.n_group=8", "model.topk_group=4"],
        ["model.q_lora_rank=null"],
        ["model.rope_scaling={factor: 32, beta_fast: 1, beta_slow: 1}"],
        ["model.first_k_dense_replace=0"],
        ["optimizer.qk_clip_threshold=null", "optimizer.grad_clip=null"],
        ["schedule.eval_interval=0", "schedule.checkpoint_interval=0"],
        ["data.tokenizer={kind: bytes, path: null, vocab_size: null}"],
        ["logging.sinks=[jsonl,tensorboard]"],
        ["optimizer.lr=0"],
    ],
)
def test_what_looks_odd_and_is_possible(overrides: list[str]) -> None:
    """Catches a rule that refuses too much."""
    compose(overrides)
