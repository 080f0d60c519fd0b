"""Every combination that cannot run, refused before anything is imported, built or written.

One function a group of the configuration, then what holds between groups. What only the
data, the machine or a run directory can show to be wrong is checked where it is opened.
"""

import math
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

from kimi_pretrain.config import names
from kimi_pretrain.config.activation import policies
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.launcher import refuse_environment, validate_launcher
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MixtureStageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScalingConfig,
    ScheduleConfig,
    StageConfig,
)
from kimi_pretrain.config.settled import micro_batch_size


def validate(config: Config) -> None:
    """Accept ``config``, or raise ConfigError for the first rule it breaks."""
    _finite(config)
    validate_model(config.model)
    _optimizer(config.optimizer)
    _schedule(config.schedule)
    _data(config.data)
    _logging(config.logging)
    _parallel(config.parallel)
    chosen = policies(config.activation)
    rule = f"activation.policy={config.activation.policy} computes nothing again"
    again = any(policy.recompute for policy in chosen.values())
    _require(again or not config.activation.ahead, "activation.ahead", True, rule, "activation=k2")
    if config.activation.host_bytes is not None:
        _at_least("activation.host_bytes", config.activation.host_bytes, 1)
    validate_launcher(config.launcher)
    _cluster(config.cluster)
    _one_of("precision", config.precision, names.PRECISIONS)
    _one_of("kernels", config.kernels, names.KERNELS)
    rule = "native kernels compute in bf16 or fp32, and precision=fp64 is plain torch"
    fits = config.kernels != "native" or config.precision != "fp64"
    _require(fits, "kernels", config.kernels, rule, "kernels=auto")
    _at_least("seed", config.seed, 0)
    _require(config.run_dir.strip() != "", "run_dir", config.run_dir, "it names a folder", "runs/a")
    _between_groups(config)


def validate_model(model: ModelConfig) -> None:
    """The model's own rules, for those who build one without the rest of a configuration.

    Raises:
        ConfigError: sizes, attention, router or a feature the family does not have.
    """
    _model_sizes(model)
    _attention(model)
    _router(model)
    _family_features(model)


# --- one group each -----------------------------------------------------------------------


def _model_sizes(model: ModelConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
    ):
        _at_least(f"model.{name}", getattr(model, name), 1)
    if model.q_lora_rank is not None:
        _at_least("model.q_lora_rank", model.q_lora_rank, 1)
    layers = model.num_hidden_layers
    dense = model.first_k_dense_replace
    rule = f"the first dense layers are among the {layers} layers"
    nearest = min(max(dense, 0), layers)
    fix = f"model.first_k_dense_replace={nearest}"
    _require(0 <= dense <= layers, "model.first_k_dense_replace", dense, rule, fix)
    _positive("model.rms_norm_eps", model.rms_norm_eps, "1e-6")
    _at_least("model.initializer_range", model.initializer_range, 0)


def _attention(model: ModelConfig) -> None:
    rope = model.qk_rope_head_dim
    rule = "RoPE turns pairs of dimensions: an even number"
    fix = f"model.qk_rope_head_dim={_up(rope, 2)}"
    _require(rope % 2 == 0, "model.qk_rope_head_dim", rope, rule, fix)
    width = model.qk_nope_head_dim + rope
    rule = f"values are padded to the width of queries, {width}, and must not exceed it"
    fix = f"model.v_head_dim={model.qk_nope_head_dim}"
    _require(model.v_head_dim <= width, "model.v_head_dim", model.v_head_dim, rule, fix)
    theta = model.rope_theta
    _require(theta > 1, "model.rope_theta", theta, "a base above 1", "model.rope_theta=50000")
    if model.rope_scaling is not None:
        _yarn(model.rope_scaling)


def _yarn(yarn: RopeScalingConfig) -> None:
    key = "model.rope_scaling"
    _one_of(f"{key}.type", yarn.type, ("yarn",))
    _at_least(f"{key}.factor", yarn.factor, 1)
    _at_least(f"{key}.original_max_position_embeddings", yarn.original_max_position_embeddings, 1)
    _positive(f"{key}.beta_slow", yarn.beta_slow, "1")
    rule = f"beta_fast counts more rotations than beta_slow, {yarn.beta_slow}"
    fix = f"{key}.beta_fast={yarn.beta_slow}"
    _require(yarn.beta_fast >= yarn.beta_slow, f"{key}.beta_fast", yarn.beta_fast, rule, fix)


def _router(model: ModelConfig) -> None:
    experts, groups, kept = model.n_routed_experts, model.n_group, model.topk_group
    rule = f"experts divide evenly into n_group={groups} groups"
    fix = f"model.n_routed_experts={_up(experts, groups)}"
    _require(experts % groups == 0, "model.n_routed_experts", experts, rule, fix)
    rule = "a group is scored by its two best experts and needs at least two"
    fix = f"model.n_group={max(experts // 2, 1)}"
    _require(groups == 1 or experts // groups >= 2, "model.n_group", groups, rule, fix)
    rule = f"a token keeps some of the n_group={groups} groups"
    _require(kept <= groups, "model.topk_group", kept, rule, f"model.topk_group={groups}")
    top_k, reachable = model.num_experts_per_tok, kept * (experts // groups)
    rule = f"a token chooses among the {reachable} experts of its topk_group={kept} groups"
    fix = f"model.num_experts_per_tok={reachable}"
    _require(top_k <= reachable, "model.num_experts_per_tok", top_k, rule, fix)
    scale = model.routed_scaling_factor
    _positive("model.routed_scaling_factor", scale, "2.827")
    _at_least("model.aux_loss_alpha", model.aux_loss_alpha, 0)


def _family_features(model: ModelConfig) -> None:
    """Keys of the Hugging Face configuration that this family gives one value only."""
    only = {
        "scoring_func": ("sigmoid", "the family's router scores with a sigmoid"),
        "topk_method": ("noaux_tc", "the family selects on score plus bias"),
        "hidden_act": ("silu", "the family's MLPs are SwiGLU"),
        "attention_bias": (False, "the family's projections have no bias"),
        "tie_word_embeddings": (False, "the family's output head is a matrix of its own"),
        "num_nextn_predict_layers": (0, "multi-token prediction is not in this version"),
    }
    for name, (value, rule) in only.items():
        actual = getattr(model, name)
        _require(actual == value, f"model.{name}", actual, rule, f"model.{name}={_text(value)}")


def _optimizer(optimizer: OptimizerConfig) -> None:
    _one_of("optimizer.name", optimizer.name, names.OPTIMIZERS)
    _one_of("optimizer.ns_coefficients", optimizer.ns_coefficients, names.NEWTON_SCHULZ_TABLES)
    _at_least("optimizer.lr", optimizer.lr, 0)
    _at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    _at_least("optimizer.router_bias_rate", optimizer.router_bias_rate, 0)
    _positive("optimizer.adam_eps", optimizer.adam_eps, "1e-8")
    _positive("optimizer.update_rms", optimizer.update_rms, "0.2")
    for key, decay, usual in (
        ("momentum", optimizer.momentum, "optimizer.momentum=0.95"),
        ("adam_betas", optimizer.adam_betas[0], "optimizer.adam_betas=[0.9,0.95]"),
        ("adam_betas", optimizer.adam_betas[1], "optimizer.adam_betas=[0.9,0.95]"),
    ):
        rule = "a moving average keeps a fraction from 0 to below 1"
        _require(0 <= decay < 1, f"optimizer.{key}", decay, rule, usual)
    if optimizer.qk_clip_threshold is not None:
        _positive("optimizer.qk_clip_threshold", optimizer.qk_clip_threshold, "100, or null: off")
    if optimizer.grad_clip is not None:
        _positive("optimizer.grad_clip", optimizer.grad_clip, "1, or null: off")


def _schedule(schedule: ScheduleConfig) -> None:
    size, micro = schedule.global_batch_size, schedule.micro_batch_size
    _at_least("schedule.global_batch_size", size, 1)
    if micro is not None:
        _at_least("schedule.micro_batch_size", micro, 1)
        rule = f"a step is whole microbatches of micro_batch_size={micro} sequences"
        fix = f"schedule.global_batch_size={_up(size, micro)}"
        _require(size % micro == 0, "schedule.global_batch_size", size, rule, fix)
    if schedule.max_steps is not None:
        _at_least("schedule.max_steps", schedule.max_steps, 1)
    for name, least in (
        ("eval_interval", 0),
        ("eval_sequences", 1),
        ("checkpoint_interval", 0),
        ("keep_checkpoints", 1),
        ("sample_tokens", 0),
    ):
        _at_least(f"schedule.{name}", getattr(schedule, name), least)
    fix = "schedule.stages=[{name: all, shape: constant, steps: 100}]"
    _require(bool(schedule.stages), "schedule.stages", [], "a schedule has a stage", fix)
    for index, stage in enumerate(schedule.stages):
        _stage(stage, f"schedule.stages.{index}")


def _stage(stage: StageConfig, key: str) -> None:
    _one_of(f"{key}.shape", stage.shape, names.STAGE_SHAPES)
    given = {"tokens": stage.tokens, "steps": stage.steps}
    rule = "a stage is counted either in tokens or in steps"
    one = (stage.tokens is None) != (stage.steps is None)
    _require(
        one, key, given, rule, f"{key}={{name: {stage.name}, shape: {stage.shape}, steps: 10}}"
    )
    for unit, amount in given.items():
        if amount is not None:
            _at_least(f"{key}.{unit}", amount, 1)
    _at_least(f"{key}.to", stage.to, 0)


def _data(data: DataConfig) -> None:
    _at_least("data.sequence_length", data.sequence_length, 1)
    if data.recipe is not None:
        _one_of("data.recipe", data.recipe, tuple(names.RECIPES))
        rule = f"the recipe {data.recipe} brings its own domains"
        none = not data.domains
        _require(none, "data.domains", [*data.domains], rule, "data=files, or no domains")
    tokenizer = data.tokenizer
    _one_of("data.tokenizer.kind", tokenizer.kind, names.TOKENIZERS)
    if tokenizer.kind == "tiktoken":
        rule = "a tokenizer of kind tiktoken reads a file"
        fix = "data.tokenizer.path=/where/tiktoken.model"
        _require(tokenizer.path is not None, "data.tokenizer.path", None, rule, fix)
    if tokenizer.vocab_size is not None:
        _at_least("data.tokenizer.vocab_size", tokenizer.vocab_size, names.BYTES_VOCABULARY)
    domains = [*names.RECIPES.get(data.recipe or "", ()), *data.domains]
    fix = "data=default, or '+data.domains.web={train: web/train}'"
    _require(bool(domains), "data.domains", {}, "without a recipe the domains are named", fix)
    for index, stage in enumerate(data.mixture):
        last = index == len(data.mixture) - 1
        _mixture_stage(stage, f"data.mixture.{index}", domains, last)


def _mixture_stage(
    stage: MixtureStageConfig, key: str, domains: Collection[str], last: bool
) -> None:
    for domain, weight in stage.weights.items():
        _one_of(f"{key}.weights", domain, domains)
        _at_least(f"{key}.weights.{domain}", weight, 0)
    some = next(iter(domains))
    rule = "some domain must have a weight above zero"
    fix = f"{key}.weights={{{some}: 1.0}}"
    _require(sum(stage.weights.values()) > 0, f"{key}.weights", stage.weights, rule, fix)
    if stage.tokens is not None:
        _at_least(f"{key}.tokens", stage.tokens, 1)
    rule = "only the last stage may leave its tokens open"
    _require(last or stage.tokens is not None, f"{key}.tokens", None, rule, f"{key}.tokens=1000000")


def _logging(logging: LoggingConfig) -> None:
    for sink in logging.sinks:
        _one_of("logging.sinks", sink, names.SINKS)
    _one_of("logging.console", logging.console, names.CONSOLES)
    _one_of("logging.wandb_mode", logging.wandb_mode, names.WANDB_MODES)
    _at_least("logging.console_interval", logging.console_interval, 1)
    _at_least("logging.layer_interval", logging.layer_interval, 1)
    _at_least("logging.rank_interval", logging.rank_interval, 1)
    if logging.prometheus_file is not None and not logging.prometheus_file.endswith(".prom"):
        raise ConfigError(
            "logging.prometheus_file",
            logging.prometheus_file,
            "node-exporter's textfile collector reads files that end in .prom",
            f"logging.prometheus_file={logging.prometheus_file}.prom",
        )
    if logging.trace_step is not None:
        _at_least("logging.trace_step", logging.trace_step, 1)


def _parallel(parallel: ParallelConfig) -> None:
    for field in ("pp", "vpp", "ep", "dp", "bucket_elements"):
        _at_least(f"parallel.{field}", getattr(parallel, field), 1)
    _one_of("parallel.schedule", parallel.schedule, names.SCHEDULES)
    if parallel.weight_grads_held is not None:
        _at_least("parallel.weight_grads_held", parallel.weight_grads_held, 0)
    _one_of("parallel.layer_split", parallel.layer_split, names.LAYER_SPLITS)
    _one_of("parallel.dense_sharding", parallel.dense_sharding, names.DENSE_SHARDINGS)
    _one_of("parallel.router_weights", parallel.router_weights, names.ROUTER_WEIGHTS)
    _one_of("parallel.dispatcher", parallel.dispatcher, names.DISPATCHERS)
    rule = "DeepEP sums on the way, so router weights act before the down-projection"
    fits = parallel.dispatcher != "deepep" or parallel.router_weights == "before_down"
    fix = "parallel.router_weights=before_down"
    _require(fits, "parallel.router_weights", parallel.router_weights, rule, fix)
    _positive("parallel.timeout_seconds", parallel.timeout_seconds, "600")


def _cluster(cluster: ClusterConfig) -> None:
    if cluster.peak_flops is not None:
        _positive("cluster.peak_flops", cluster.peak_flops, "989e12")
    _one_of("cluster.device", cluster.device, ("gpu", "cpu"))
    refuse_environment("cluster.environment", cluster.environment)


def validate_training(config: Config) -> None:
    """What a plan may leave open and a training run may not, and what is not trained yet.

    Raises:
        ConfigError: a batch that does not divide over the replicas, stages without a
            schedule.
    """
    parallel, schedule = config.parallel, config.schedule
    size, dp, micro = schedule.global_batch_size, parallel.dp, micro_batch_size(config)
    rule = f"the parallel.dp={dp} replicas take equal shares of it"
    fix = f"schedule.global_batch_size={_up(size, dp)}"
    _require(size % dp == 0, "schedule.global_batch_size", size, rule, fix)
    rule = f"a replica's share of {size // dp} sequences is whole microbatches"
    fix = f"schedule.micro_batch_size={math.gcd(size // dp, micro)}"
    _require(size // dp % micro == 0, "schedule.micro_batch_size", micro, rule, fix)
    stages, order = parallel.pp * parallel.vpp, parallel.schedule
    rule = f"parallel.pp x parallel.vpp = {stages} stages need a schedule"
    known = stages == 1 or order != "none" or parallel.schedule_file is not None
    _require(known, "parallel.schedule", order, rule, "parallel.schedule=k2")


# --- between groups -----------------------------------------------------------------------


def _between_groups(config: Config) -> None:
    model, data, schedule = config.model, config.data, config.schedule
    positions = model.max_position_embeddings
    rule = f"a sequence fits into model.max_position_embeddings={positions}"
    fix = f"data.sequence_length={positions}"
    fits = data.sequence_length <= positions
    _require(fits, "data.sequence_length", data.sequence_length, rule, fix)

    ids = names.BYTES_VOCABULARY if data.tokenizer.kind == "bytes" else data.tokenizer.vocab_size
    if ids is not None:
        rule = f"every id of the tokenizer needs an embedding, and it has {ids}"
        fix = f"model.vocab_size={ids}"
        _require(ids <= model.vocab_size, "model.vocab_size", model.vocab_size, rule, fix)

    parallel = config.parallel
    experts = model.n_routed_experts
    rule = f"the {experts} experts divide evenly over the ranks of an expert-parallel group"
    nearest = max(n for n in range(1, min(parallel.ep, experts) + 1) if experts % n == 0)
    fix = f"parallel.ep={nearest}"
    _require(experts % parallel.ep == 0, "parallel.ep", parallel.ep, rule, fix)
    dp, ep = parallel.dp, parallel.ep
    rule = f"it counts the replicas of the dense parameters, edp x ep: a multiple of ep={ep}"
    _require(dp % ep == 0, "parallel.dp", dp, rule, f"parallel.dp={_up(dp, ep)}")

    step = schedule.global_batch_size * data.sequence_length
    for index, stage in enumerate(schedule.stages):
        if stage.tokens is not None:
            key = f"schedule.stages.{index}.tokens"
            rule = f"a stage lasts at least one step, which is {step} tokens"
            _require(stage.tokens >= step, key, stage.tokens, rule, f"{key}={step}")


# --- the rules' vocabulary ----------------------------------------------------------------


def _require(holds: bool, what: str, value: object, rule: str, fix: str) -> None:
    if not holds:
        raise ConfigError(what, value, rule, fix)


def _at_least(key: str, value: float, least: int) -> None:
    _require(value >= least, key, value, f"it is at least {least}", f"{key}={least}")


def _positive(key: str, value: float, usual: str) -> None:
    _require(value > 0, key, value, "it is above zero", f"{key}={usual}")


def _one_of(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        rule = f"it is one of {', '.join(choices)}"
        raise ConfigError(key, value, rule, f"{key}={nearest_name(value, choices)}")


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _finite(node: Any, key: str = "") -> None:
    """No number anywhere is NaN or infinite: every comparison with NaN would pass silently."""
    if is_dataclass(node):
        items = [(field.name, getattr(node, field.name)) for field in fields(node)]
    elif isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list | tuple):
        items = [(str(index), item) for index, item in enumerate(node)]
    else:
        holds = not isinstance(node, float) or math.isfinite(node)
        _require(holds, key, node, "a number is finite", f"{key}=1.0")
        return
    for name, item in items:
        _finite(item, f"{key}.{name}" if key else str(name))
