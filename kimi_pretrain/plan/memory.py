"""What every pipeline rank holds, by component. All ranks of one stage are equal."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.pipeline.actions import COMPUTE, leaves
from kimi_pretrain.plan.activations import Setting, stage_kept
from kimi_pretrain.plan.communication import ROW_BYTES
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.in_flight import most_held
from kimi_pretrain.plan.layout_report import (
    GRADIENT_BYTES,
    PARAMETER_BYTES,
    STATE_BYTES,
    LayoutReport,
)
from kimi_pretrain.plan.operations import INT64
from kimi_pretrain.plan.run_schedule import RunSchedule
from kimi_pretrain.plan.totals import ModelTotals

# Room on the host over balanced routing's: a rank whose experts are chosen more often keeps more.
HOST_MARGIN = 1.25

COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "weight_gradients",
    "communication",
    "reserved",
    "fragmentation",
)


@dataclass(frozen=True)
class Static:
    """Bytes that a rank holds whatever it computes."""

    parameters: float  # bf16
    gradients: float  # fp32
    optimizer: float  # ZeRO-1: fp32 master and moments


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank; see ``COMPONENTS``."""

    rank: int  # of the pipeline
    parameters: float
    gradients: float
    optimizer: float
    # what forwards keep for backwards and a backward computes again or widens, at its most
    activations: float
    weight_gradients: float  # what waits between I and W, or within one layer's backward
    communication: float  # rows, activations and gradients on their way, the step's tokens
    reserved: float  # CUDA, NCCL, libraries
    fragmentation: float
    microbatches: int  # (stage, microbatch) kept on the device at its most
    tags: dict[str, float]  # of one microbatch on all of the rank's stages
    host: float  # reserved for offloaded activations
    offloaded: float  # of it in use at its most, with balanced routing

    @property
    def total(self) -> float:
        return float(sum(getattr(self, name) for name in COMPONENTS))


def static_of_layout(report: LayoutReport) -> list[Static]:
    """[pp] as the optimizer lays it out, padding included."""
    by_rank = {
        rank: Static(s.parameter_bytes, s.gradient_bytes, s.state_bytes)
        for s in report.stages
        for rank in s.stages
    }
    return [by_rank[rank] for rank in sorted(by_rank)]


def static_without_padding(
    config: Config, layers: Sequence[range], stages: Sequence[Sequence[int]]
) -> list[Static]:
    """The same in closed form, a lower bound within a percent: no layout is made.

    Args:
        config: of the run.
        layers: of every stage.
        stages: of each rank that is wanted.
    """
    topology = Topology.of_config(config.parallel)
    totals = ModelTotals(config.model, topology.ep)
    ranks = []
    for held in stages:
        total = totals.rank(layers[stage] for stage in held)
        muon = total.experts / topology.edp + total.dense / topology.dp
        state = STATE_BYTES["aligned"] * muon + STATE_BYTES["adamw"] * total.adamw / topology.dp
        elements = total.elements
        ranks.append(Static(PARAMETER_BYTES * elements, GRADIENT_BYTES * elements, state))
    return ranks


def rank_memory(
    config: Config, run: RunSchedule, static: list[Static], hardware: Hardware
) -> list[RankMemory]:
    """[pp] what each rank holds.

    Args:
        config: settled.
        run: its schedule, with offloads where the policy offloads.
        static: of every rank.
        hardware: allowances.

    Raises:
        ConfigError: an unknown activation policy.
    """
    setting = Setting.of(config, micro_batch_size(config))
    kept = [stage_kept(setting, layers) for layers in run.layers]
    ranks = []
    for rank, fixed in enumerate(static):
        stages = run.stages(rank)
        held = most_held(run.schedule, rank, kept)
        tags: dict[str, float] = {}
        for stage in stages:
            for tag, size in (kept[stage].stays | kept[stage].leaves).items():
                tags[tag] = tags.get(tag, 0.0) + size
        flying = _flying(config, setting, run, rank)
        slab = host_slab(config, held.host)
        here = held.device + max(0.0, held.host - slab)  # what finds no room stays
        moving = here + held.gradients + flying
        ranks.append(
            RankMemory(
                rank=rank,
                parameters=fixed.parameters,
                gradients=fixed.gradients,
                optimizer=fixed.optimizer,
                activations=here,
                weight_gradients=held.gradients,
                communication=flying,
                reserved=hardware.reserved_bytes,
                fragmentation=hardware.fragmentation * moving,
                microbatches=held.microbatches,
                tags=tags,
                host=slab,
                offloaded=min(held.host, slab),
            )
        )
    return ranks


def host_slab(config: Config, most: float) -> float:
    """Bytes of host memory that a rank reserves, which has ``most`` there at once in bf16."""
    size = config.activation.host_bytes
    return HOST_MARGIN * most if size is None else float(size)


def flying_rows(config: Config, run: RunSchedule, rank: int) -> float:
    """Bytes of rows to and from experts that are on their way at once, balanced: those sent and
    those arriving, twice where both of a pair have experts."""
    if config.parallel.ep == 1:
        return 0.0
    dense, size = config.model.first_k_dense_replace, micro_batch_size(config)
    routes = [layers.stop > max(layers.start, dense) for layers in run.layers]
    at_once = max(
        sum(routes[leaf.stage] for leaf in leaves(node) if leaf.kind in COMPUTE)
        for node in run.schedule.ranks[rank]
    )
    rows = 2 * at_once * config.model.num_experts_per_tok * size * config.data.sequence_length
    return float(ROW_BYTES * config.model.hidden_size * rows)


def _flying(config: Config, setting: Setting, run: RunSchedule, rank: int) -> float:
    """Rows to experts; messages both ways; a bucket's sums; the step's tokens and labels.

    On one rank rows go from phase to phase all the same, and the gradient from layer to layer.
    """
    parallel, model = config.parallel, config.model
    row = ROW_BYTES * model.hidden_size * setting.tokens
    rows = flying_rows(config, run, rank)
    if parallel.ep == 1:
        rows = float(row * model.num_experts_per_tok)
    messages = 4 if parallel.pp > 1 else 1  # one each way, sent and received
    shards = GRADIENT_BYTES * ceil(parallel.bucket_elements) * (parallel.dp > 1)
    sequences = config.schedule.global_batch_size // parallel.dp
    batch = 2 * INT64 * sequences * config.data.sequence_length
    return rows + float(row * messages + shards + batch)
