"""The plan of a run: parameters, memory, bytes, time, from the configuration alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.plan.activations import Setting
from kimi_pretrain.plan.communication import Bytes, all_to_all, message
from kimi_pretrain.plan.costs import run_costs
from kimi_pretrain.plan.flops import newton_schulz_flops_per_step, training_flops_per_token
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.layout_report import layout_report, require_muonclip
from kimi_pretrain.plan.memory import RankMemory, rank_memory, static_of_layout
from kimi_pretrain.plan.parameters import ParameterCount, count_parameters
from kimi_pretrain.plan.run_schedule import RunSchedule, run_schedule, steady
from kimi_pretrain.plan.step_time import Replication, StepTime, replication, step_time
from kimi_pretrain.plan.totals import ModelTotals


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it is started."""

    config: Config
    topology: Topology
    hardware: Hardware
    run: RunSchedule
    count: ParameterCount
    memory: tuple[RankMemory, ...]  # [pp]
    all_to_all: Bytes  # of one dispatch or combine: a layer, a microbatch
    message: Bytes  # of one microbatch over one boundary of stages
    replicas: tuple[Replication, ...]  # [pp]
    costs: Costs
    step: StepTime
    flops_per_token: int
    newton_schulz: int  # FLOPs of a step, all ranks together

    @property
    def step_tokens(self) -> int:
        return self.config.schedule.global_batch_size * self.config.data.sequence_length

    @property
    def tokens_per_gpu_second(self) -> float:
        return self.step_tokens / self.step.seconds / self.topology.world

    @property
    def mfu(self) -> float:
        """Model FLOPs of forward and backward over the peak; recomputation does not count."""
        return self.tokens_per_gpu_second * self.flops_per_token / self.hardware.peak

    @property
    def newton_schulz_share(self) -> float:
        """Of the step's model FLOPs."""
        return self.newton_schulz / (self.step_tokens * self.flops_per_token)

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.hardware)

    def gpu_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_gpu_second / 3600

    def all_to_alls(self, rank: int) -> int:
        """Dispatches and combines of a rank in a step, forwards and backwards."""
        dense = self.config.model.first_k_dense_replace
        layers = [layer for s in self.run.stages(rank) for layer in self.run.layers[s]]
        moe = sum(layer >= dense for layer in layers)
        return 4 * moe * self.run.schedule.microbatches

    def messages(self, rank: int) -> int:
        """Activations and gradients that a rank sends its neighbours in a step."""
        placement = self.run.schedule.placement
        pairs = pairwise(placement)
        sent = sum((a == rank) + (b == rank) for a, b in pairs if a != b)
        return sent * self.run.schedule.microbatches


def fits(memory: Sequence[RankMemory], hardware: Hardware) -> bool:
    """Whether every rank has room on its GPU and in its share of the host's memory."""
    return all(
        rank.total <= hardware.memory_bytes and rank.host <= hardware.host_memory_bytes
        for rank in memory
    )


def plan_run(config: Config, memory: Sequence[RankMemory] | None = None) -> Plan:
    """The plan of a run that ``config`` describes, in bf16.

    Args:
        config: settled.
        memory: [pp] of its ranks, where that is known but for the padding of what is static.

    Raises:
        ConfigError: facts of the cluster are missing, ranks, batch or schedule do not fit each
            other or the model, or a precision, an optimizer or a policy that is not planned.
    """
    precision_of(config)
    hardware = Hardware.of(config.cluster)
    topology = Topology.of_config(config.parallel)
    setting = Setting.of(config, micro_batch_size(config))
    run = run_schedule(config)
    layout = layout_report(config)
    static = static_of_layout(layout)
    if memory is None:
        memory = rank_memory(config, run, static, hardware)
    padded = tuple(
        replace(rank, **asdict(fixed)) for rank, fixed in zip(memory, static, strict=True)
    )
    flops, sent = [0.0] * topology.pp, [0.0] * topology.pp
    for stage in layout.stages:
        for rank in stage.stages:
            flops[rank] = stage.newton_schulz.most
            sent[rank] = stage.exchange_bytes_most
    experts, dense = parameters_of_ranks(config, run)
    replicas = replication(topology, experts, dense, static, flops, sent, hardware)
    costs = run_costs(config, run.layers, hardware)
    return Plan(
        config=config,
        topology=topology,
        hardware=hardware,
        run=run,
        count=count_parameters(config.model),
        memory=padded,
        all_to_all=all_to_all(config, topology, hardware, setting.tokens),
        message=message(config, topology, hardware, setting.tokens),
        replicas=tuple(replicas),
        costs=costs,
        step=step_time(run, costs, replicas, hardware),
        flops_per_token=training_flops_per_token(config.model, config.data.sequence_length),
        newton_schulz=newton_schulz_flops_per_step(config.model),
    )


def memory_of_run(config: Config) -> tuple[RankMemory, ...]:
    """[pp] what each rank holds, as in ``plan_run``, in a fraction of its time.

    Raises:
        ConfigError: as ``plan_run``.
    """
    precision_of(config)
    hardware, run = Hardware.of(config.cluster), run_schedule(steady(config))
    return tuple(rank_memory(config, run, static_of_layout(layout_report(config)), hardware))


def unplanned(config: Config) -> str | None:
    """Why a run that can train has no plan, in one line; None where it has one."""
    try:
        precision_of(config)
        require_muonclip(config)
        Hardware.of(config.cluster)
    except ConfigError as error:
        return str(error)
    return None


def precision_of(config: Config) -> None:
    """Refuses what is not planned: parameters of another width."""
    if config.precision not in ("auto", "bf16"):
        rule = "a plan is of bf16 parameters and fp32 gradients"
        raise ConfigError("precision", config.precision, rule, "precision=bf16")


def parameters_of_ranks(config: Config, run: RunSchedule) -> tuple[list[int], list[int]]:
    """[pp] parameters of experts and all others that a rank of each stage holds."""
    totals = ModelTotals(config.model, config.parallel.ep)
    ranks = [
        totals.rank(run.layers[stage] for stage in run.stages(rank))
        for rank in range(config.parallel.pp)
    ]
    return [r.experts for r in ranks], [r.dense + r.adamw for r in ranks]


def token_budget(config: Config) -> int:
    """Tokens that the schedule's stages, or ``max_steps``, train on."""
    schedule = config.schedule
    step = schedule.global_batch_size * config.data.sequence_length
    total = sum(
        stage.tokens if stage.tokens is not None else (stage.steps or 0) * step
        for stage in schedule.stages
    )
    return total if schedule.max_steps is None else min(total, schedule.max_steps * step)
