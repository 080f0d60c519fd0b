"""How long a step takes: the simulated pipeline, then what ZeRO-1 and the optimizer add.

- A stage's gradients are reduced while the rest of its last weight gradients are computed
  (``docs/zero1.md``); what is left when a rank has no more to compute is exposed.
- The gradient norm is one number for all ranks: the update starts when the last gradients have
  arrived, and takes as long as the busiest rank's.
- Parameters are gathered under the next step's forwards, which wait for the layer they need.

Links are counted as if each kind of traffic had them to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import COMPUTE, Timeline
from kimi_pretrain.plan.communication import Bytes, replicated
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.layout_report import GRADIENT_BYTES, PARAMETER_BYTES
from kimi_pretrain.plan.memory import Static
from kimi_pretrain.plan.run_schedule import RunSchedule


@dataclass(frozen=True)
class Replication:
    """What a rank exchanges with its replicas in a step, and how long the update takes it."""

    reduce_scatter: Bytes  # fp32 gradients
    all_gather: Bytes  # bf16 parameters
    exchange: Bytes  # updates of matrices that an owner orthogonalises, there and back
    newton_schulz: float  # FLOPs
    update: float  # seconds: Newton-Schulz, reading and writing state, the exchange


@dataclass(frozen=True)
class StepTime:
    """One step, in seconds. What is exposed is what nothing computes under."""

    timeline: Timeline
    reduce_scatter: float  # exposed
    optimizer: float
    all_gather: float  # exposed

    @property
    def pipeline(self) -> float:
        """All forwards and backwards."""
        return self.timeline.seconds

    @property
    def seconds(self) -> float:
        return self.pipeline + self.reduce_scatter + self.optimizer + self.all_gather


def replication(
    topology: Topology,
    experts: Sequence[int],
    dense: Sequence[int],
    static: Sequence[Static],
    newton_schulz: Sequence[float],
    exchange: Sequence[float],
    hardware: Hardware,
) -> list[Replication]:
    """[pp] of every rank.

    Args:
        topology: of the run.
        experts: [pp] expert parameters of a rank.
        dense: [pp] its other parameters.
        static: [pp] bytes it holds.
        newton_schulz: [pp] FLOPs of its busiest replica.
        exchange: [pp] bytes that its busiest replica sends and brings back.
        hardware: rates.
    """
    edp, dp = topology.group("edp", 0), topology.group("dp", 0)
    ranks = []
    for rank in range(topology.pp):

        def ring(size: int, rank: int = rank) -> Bytes:
            over_edp = size * experts[rank] * (len(edp) - 1) / len(edp)
            over_dp = size * dense[rank] * (len(dp) - 1) / len(dp)
            return replicated(over_edp, edp, hardware) + replicated(over_dp, dp, hardware)

        flops, travels = newton_schulz[rank], replicated(exchange[rank], dp, hardware)
        touched = 2 * static[rank].optimizer + static[rank].parameters / topology.dp
        update = flops / hardware.matmul + touched / hardware.memory + travels.seconds(hardware)
        ranks.append(
            Replication(ring(GRADIENT_BYTES), ring(PARAMETER_BYTES), travels, flops, update)
        )
    return ranks


def step_time(
    run: RunSchedule, costs: Costs, replicas: Sequence[Replication], hardware: Hardware
) -> StepTime:
    """Simulates a step and adds what follows the pipeline."""
    timeline = simulate(run.schedule, costs)
    spans = _spans(timeline, run)
    arrived, waited = timeline.seconds, 0.0
    for rank, replica in enumerate(replicas):
        stages = run.stages(rank)
        layers = sum(len(run.layers[stage]) for stage in stages)
        reduce, gather = replica.reduce_scatter, replica.all_gather
        free = gathered = 0.0
        for stage in sorted(stages, key=lambda s: spans[s].last_end):
            span, count = spans[stage], len(run.layers[stage])
            one = reduce.seconds(hardware) / layers  # of a layer
            first = span.last_start + (span.last_end - span.last_start) / count
            free = max(span.last_end + one, max(free, first) + one * count)
        arrived = max(arrived, free)
        for stage in sorted(stages, key=lambda s: spans[s].first_start):
            span, count = spans[stage], len(run.layers[stage])
            one = gather.seconds(hardware) / layers
            before_last = (span.first_end - span.first_start) * (count - 1) / count
            waited = max(
                waited,
                gathered + one - span.first_start,
                gathered + one * count - span.first_start - before_last,
            )
            gathered += one * count
    update = max(replica.update for replica in replicas)
    return StepTime(timeline, arrived - timeline.seconds, update, waited)


@dataclass
class _Span:
    """When a stage's first forward and its last weight gradients compute."""

    first_start: float
    first_end: float
    last_start: float = 0.0
    last_end: float = 0.0


def _spans(timeline: Timeline, run: RunSchedule) -> list[_Span]:
    spans: dict[int, _Span] = {}
    for rank, intervals in enumerate(timeline.ranks):
        seen: dict[int, str] = {}
        for interval in intervals:
            if interval.resource != COMPUTE:
                continue
            action = interval.name.split(" ", 1)[0]
            number = action.rstrip("0123456789")
            stage, kind = int(number[:-1]), number[-1]
            if stage not in spans:
                spans[stage] = _Span(interval.start, interval.end)
                seen[stage] = action
            span = spans[stage]
            if kind == "F" and seen[stage] == action:
                span.first_end = interval.end
            elif kind in "WB":
                if seen.get(-1 - stage) != action:
                    seen[-1 - stage] = action
                    span.last_start = interval.start
                span.last_end = interval.end
        assert all(stage in spans for stage in run.stages(rank))
    return [spans[stage] for stage in range(len(run.layers))]
