"""What a dry run counted beside what the planner says of the same rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

from kimi_pretrain.config.activation import GRADIENTS
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.dry_run.rank import RankRun
from kimi_pretrain.pipeline.actions import Action, Kind
from kimi_pretrain.plan.activations import Setting, stage_kept
from kimi_pretrain.plan.in_flight import held_along
from kimi_pretrain.plan.layout_report import exchange_bytes, rank_layout
from kimi_pretrain.plan.memory import flying_rows
from kimi_pretrain.plan.run_plan import Plan

TOLERANCE = 0.01


@dataclass(frozen=True)
class Row:
    """One quantity in bytes, counted and planned."""

    what: str
    counted: float
    planned: float
    bound: bool = False  # the plan is the most that it can be, not what it is

    @property
    def difference(self) -> float:
        """Of what was counted from the plan, relative to the plan."""
        if self.counted == self.planned:
            return 0.0
        return (self.counted - self.planned) / self.planned if self.planned else inf

    @property
    def agrees(self) -> bool:
        """To ``TOLERANCE``."""
        return self.difference <= TOLERANCE and (self.bound or self.difference >= -TOLERANCE)


def compare(plan: Plan, run: RankRun) -> list[Row]:
    """Sizes and bytes of a rank.

    Args:
        plan: of the configuration that was run.
        run: of one of its ranks.
    """
    return [*_held(plan, run), *_sent(plan, run)]


def _held(plan: Plan, run: RankRun) -> Iterator[Row]:
    memory = plan.memory[run.at.pp]
    yield Row("parameters, bf16", run.parameters, memory.parameters)
    yield Row("gradients, fp32", run.gradients, memory.gradients)
    yield Row("ZeRO-1 state", run.optimizer, memory.optimizer)
    setting = Setting.of(plan.config, micro_batch_size(plan.config))
    kept = [stage_kept(setting, layers) for layers in plan.run.layers]
    for stage in sorted(plan.run.stages(run.at.pp)):
        counted = run.kept.get(stage, 0)  # of a stage whose forwards none had for itself
        yield Row(f"a microbatch keeps, stage {stage}", counted, kept[stage].total)
    schedule = plan.run.schedule
    if memory.offloaded:
        yield Row("on the host, most", run.host, memory.offloaded)
    else:
        during = held_along(schedule, run.at.pp, kept)
        nodes = zip(schedule.ranks[run.at.pp], during, strict=True)
        rests = [
            held.device for node, held in nodes if isinstance(node, Action) and node.kind is Kind.F
        ]
        yield Row("kept between actions, most", run.resting, max(rests))
    owed = [stage_kept(setting, layers, GRADIENTS) for layers in plan.run.layers]
    waiting = max(held.gradients for held in held_along(schedule, run.at.pp, owed))
    yield Row("gradients until W, most", run.until_w, waiting)
    yield Row(
        "rows to experts on their way, most",
        run.flying,
        flying_rows(plan.config, plan.run, run.at.pp),
    )
    moving = memory.activations + memory.weight_gradients + memory.communication
    yield Row("all that comes and goes, most", run.moving, moving, bound=True)


def _sent(plan: Plan, run: RankRun) -> Iterator[Row]:
    rank, replica = run.at.pp, plan.replicas[run.at.pp]
    dispatches = plan.all_to_all.total * plan.all_to_alls(rank)
    yield Row("ep: all-to-all", _bytes(run.sent, "all_to_all", "ep"), dispatches)
    away = plan.all_to_all.rdma * plan.all_to_alls(rank)
    yield Row("  of it between nodes", _bytes(run.between_nodes, "all_to_all", "ep"), away)
    messages = plan.message.times(plan.messages(rank))
    yield Row("pp: messages", _bytes(run.sent, "send", "pp"), messages.total)
    yield Row("  of them between nodes", _bytes(run.between_nodes, "send", "pp"), messages.rdma)
    reduced = _bytes(run.sent, "reduce_scatter", "edp", "dp")
    yield Row("dp: reduce-scatter, fp32", reduced, replica.reduce_scatter.total)
    gathered = _bytes(run.sent, "all_gather", "edp", "dp")
    yield Row("dp: all-gather, bf16", gathered, replica.all_gather.total)
    moved = exchange_bytes(rank_layout(plan.config, rank))
    index = run.at.edp * plan.topology.ep + run.at.ep
    yield Row("dp: Muon's exchange", _bytes(run.sent, "all_to_all", "edp", "dp"), moved[index])


def _bytes(sent: Mapping[str, Mapping[str, int]], operation: str, *groups: str) -> int:
    return sum(sent[group].get(operation, 0) for group in groups)
