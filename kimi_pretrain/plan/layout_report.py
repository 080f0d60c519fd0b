"""What the ZeRO-1 layout of a run costs each rank: bytes held, bytes sent, Newton-Schulz work.

Everything is counted on the layout that the optimizer then uses, not estimated beside it.
Parameters are counted in bf16, gradients and state in fp32, bytes sent over all peers.
"""

from dataclasses import dataclass
from itertools import chain

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.optim.buckets import Bucket, Layout, Spec
from kimi_pretrain.optim.layout import plan_layout
from kimi_pretrain.optim.ownership import lent, newton_schulz_flops, work
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.plan.run_schedule import rank_stages
from kimi_pretrain.plan.shapes import stage_specs
from kimi_pretrain.plan.stages import split_layers

PARAMETER_BYTES = 2  # bf16
GRADIENT_BYTES = 4  # fp32
# fp32 master and momentum, or master and both moments
STATE_BYTES = {"aligned": 8, "flat": 8, "adamw": 12}
EXCHANGE_BYTES = 2  # bf16, to the owner and back


@dataclass(frozen=True)
class Owned:
    """A dense matrix and the dp rank of its stage that orthogonalises it."""

    name: str
    index: int  # within the parameter's stack
    rows: int
    cols: int
    owner: int


@dataclass(frozen=True)
class Work:
    """Newton-Schulz FLOPs of a step: of the busiest rank, on average, of one matrix."""

    most: int
    mean: float
    largest_matrix: int  # no layout gives its owner less

    @property
    def imbalance(self) -> float:
        return self.most / self.mean if self.mean else 1.0


@dataclass(frozen=True)
class StageReport:
    """One pipeline rank's stages, or those of several that differ in their layers' numbers only.

    Bytes and elements are of one rank, all ranks of a stage being equal but for ``exchange``.
    """

    stages: tuple[int, ...]  # pipeline ranks; with one stage a rank, their stages
    layers: tuple[tuple[int, int], ...]  # first and last of each stage, rank by rank
    parameters: int  # elements on a rank, padding left out
    stage_parameters: int  # elements of the stage, each expert and replica once
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    expert_padding: float  # buffer over elements: 1.0 is none
    dense_padding: float
    dense_sharding: str  # flat | aligned | none
    buckets: dict[str, int]  # of each kind
    reduce_scatter_bytes: int
    all_gather_bytes: int
    exchange_bytes_mean: float
    exchange_bytes_most: int
    expert_matrices: int  # of the stage
    expert_matrices_lent: int
    newton_schulz: Work
    owners: tuple[Owned, ...]  # of the first stage's dense matrices, the costliest first


@dataclass(frozen=True)
class LayoutReport:
    """A run's stages and what they make together."""

    model: str
    topology: Topology
    stages: tuple[StageReport, ...]

    @property
    def parameters(self) -> int:
        return sum(len(stage.stages) * stage.stage_parameters for stage in self.stages)

    @property
    def held_bytes(self) -> int:
        """Parameters, gradients and state of all ranks together."""
        return self.topology.dp * sum(
            len(s.stages) * (s.parameter_bytes + s.gradient_bytes + s.state_bytes)
            for s in self.stages
        )

    @property
    def newton_schulz(self) -> Work:
        """Over all ranks of the run."""
        total = sum(len(s.stages) * s.newton_schulz.mean for s in self.stages)
        return Work(
            max(s.newton_schulz.most for s in self.stages),
            total / self.topology.pp,
            max(s.newton_schulz.largest_matrix for s in self.stages),
        )

    @property
    def newton_schulz_total(self) -> int:
        return round(self.newton_schulz.mean * self.topology.pp * self.topology.dp)


def require_muonclip(config: Config) -> None:
    """Refuses another optimizer, whose state lies otherwise."""
    if config.optimizer.name != "muonclip":
        rule = "this layout is MuonClip's"
        raise ConfigError("optimizer.name", config.optimizer.name, rule, "optimizer=muonclip")


def layout_report(config: Config) -> LayoutReport:
    """The report of a run that ``config`` describes.

    Raises:
        ConfigError: ranks that do not fit each other or the model, or another optimizer than
            MuonClip.
    """
    parallel = config.parallel
    require_muonclip(config)
    topology = Topology.of_config(parallel)
    layers = split_layers(config.model, parallel)
    # Ranks of the same shapes have the same layout but for names.
    alike: dict[tuple[object, ...], list[tuple[int, list[range], list[Spec]]]] = {}
    for rank, stages in enumerate(rank_stages(config)):
        held = [layers[stage] for stage in stages]
        specs = [spec for part in held for spec in stage_specs(config.model, part, parallel.ep)]
        key = tuple((spec.shape, spec.muon, spec.expert) for spec in specs)
        alike.setdefault(key, []).append((rank, held, specs))
    reports = []
    for same in alike.values():
        ranks, ranges, (specs, *_) = zip(*same, strict=True)
        reports.append(_stage_report(ranks, tuple(chain(*ranges)), _layout(config, specs)))
    return LayoutReport(config.model.name, topology, tuple(reports))


def rank_layout(config: Config, rank: int) -> Layout:
    """The buckets and owners of one pipeline rank's stages."""
    layers = split_layers(config.model, config.parallel)
    held = [layers[stage] for stage in rank_stages(config)[rank]]
    ep = config.parallel.ep
    return _layout(config, [s for part in held for s in stage_specs(config.model, part, ep)])


def _layout(config: Config, specs: list[Spec]) -> Layout:
    parallel, topology = config.parallel, Topology.of_config(config.parallel)
    return plan_layout(
        specs, topology.edp, topology.ep, parallel.dense_sharding, parallel.bucket_elements
    )


def _stage_report(
    stages: tuple[int, ...], layers: tuple[range, ...], layout: Layout
) -> StageReport:
    buckets = layout.buckets
    experts = [b for b in buckets if b.group == "edp"]
    dense = [b for b in buckets if b.group == "dp" and b.kind != "adamw"]
    sent = exchange_bytes(layout)
    return StageReport(
        stages=stages,
        layers=tuple((r.start, r.stop - 1) for r in layers),
        parameters=sum(b.elements for b in buckets),
        stage_parameters=sum(b.elements * (layout.ep if b.group == "edp" else 1) for b in buckets),
        parameter_bytes=sum(PARAMETER_BYTES * b.size for b in buckets),
        gradient_bytes=sum(GRADIENT_BYTES * b.size for b in buckets),
        state_bytes=sum(STATE_BYTES[b.kind] * b.shard for b in buckets),
        expert_padding=_padding(experts),
        dense_padding=_padding(dense),
        dense_sharding=dense[0].kind if dense else "none",
        buckets={kind: sum(b.kind == kind for b in buckets) for kind in STATE_BYTES},
        reduce_scatter_bytes=sum(GRADIENT_BYTES * (b.size - b.shard) for b in buckets),
        all_gather_bytes=sum(PARAMETER_BYTES * (b.size - b.shard) for b in buckets),
        exchange_bytes_mean=sum(sent) / len(sent),
        exchange_bytes_most=max(sent),
        expert_matrices=layout.ep * sum(len(b.matrices) for b in experts),
        expert_matrices_lent=lent(layout),
        newton_schulz=_work(layout),
        owners=_owners(dense),
    )


def exchange_bytes(layout: Layout) -> list[int]:
    """Bytes that each dp rank sends a step to bring matrices to their owners and back."""
    sent = [0] * layout.dp
    for bucket in layout.buckets:
        for ep_index, owners in enumerate(bucket.owners):
            for matrix, owner in zip(bucket.matrices, owners, strict=True):
                for part in bucket.parts(matrix.offset, matrix.stop):
                    holder = bucket.dp_rank(part.rank, ep_index, layout.ep)
                    if holder != owner:
                        for rank in (holder, owner):  # there, and back
                            sent[rank] += EXCHANGE_BYTES * (part.stop - part.start)
    return sent


def _padding(buckets: list[Bucket]) -> float:
    elements = sum(b.elements for b in buckets)
    return sum(b.size for b in buckets) / elements if elements else 1.0


def _work(layout: Layout) -> Work:
    loads = work(layout)
    matrices = [5 * newton_schulz_flops(m.rows, m.cols) for b in layout.buckets for m in b.matrices]
    return Work(max(loads), sum(loads) / len(loads), max(matrices, default=0))


def _owners(dense: list[Bucket]) -> tuple[Owned, ...]:
    owned = [
        Owned(bucket.slots[m.slot].spec.name, m.index, m.rows, m.cols, owner)
        for bucket in dense
        for m, owner in zip(bucket.matrices, bucket.owners[0], strict=True)
    ]
    owned.sort(key=lambda o: (-newton_schulz_flops(o.rows, o.cols), o.name, o.index))
    return tuple(owned)
