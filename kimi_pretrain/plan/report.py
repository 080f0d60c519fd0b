"""A plan as text of at most 100 columns, or as plain data for JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.plan.communication import Bytes, all_to_all_bytes_per_token
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.layout_table import si
from kimi_pretrain.plan.memory import COMPONENTS, RankMemory
from kimi_pretrain.plan.run_plan import Plan
from kimi_pretrain.plan.shortage import Shortage

LABELS = {
    "parameters": "parameters, bf16",
    "gradients": "gradients, fp32",
    "optimizer": "ZeRO-1 state",
    "activations": "activations kept",
    "weight_gradients": "waiting for W",
    "communication": "on their way",
    "reserved": "CUDA, NCCL, libraries",
    "fragmentation": "fragmentation",
}
GB = 1e9
_COLUMNS = 5  # of ranks


def plan_lines(plan: Plan, short: Shortage | None, budget: float) -> Iterator[str]:
    """The plan as lines.

    Args:
        plan: of a run.
        short: what it lacks.
        budget: tokens that the run trains on.
    """
    t, h, schedule = plan.topology, plan.hardware, plan.run.schedule
    parallel = plan.config.parallel
    yield (
        f"{plan.config.model.name} on {t.world:,} x {h.name} = edp {t.edp} x pp {t.pp} x "
        f"ep {t.ep}; dp {t.dp}"
    )
    yield (
        f"schedule {schedule.name}, vpp {schedule.vpp}, {schedule.microbatches} microbatches of "
        f"{micro_batch_size(plan.config)} x {plan.config.data.sequence_length:,} tokens; "
        f"activation {plan.config.activation.policy}; {parallel.dispatcher}"
    )
    yield ""
    yield from _parameters(plan)
    yield ""
    yield from _memory(plan)
    yield from fit_lines(plan, short)
    yield ""
    yield from _sent(plan)
    yield ""
    yield from _time(plan)
    yield ""
    yield from _speed(plan, budget)


def fit_lines(plan: Plan, short: Shortage | None) -> Iterator[str]:
    """Whether it fits; if not, by how much, where, and what would help."""
    h, full = plan.hardware, plan.fullest
    if short is None:
        room = (h.memory_bytes - full.total) / GB
        yield f"fits: pipeline rank {full.rank} is the fullest and leaves {room:.1f} GB of {_gb(h)}"
        return
    yield (
        f"DOES NOT FIT: pipeline rank {short.rank} needs {short.over / GB:.1f} GB more than its "
        f"{short.place} has; most of it is {LABELS[short.largest]}"
    )
    if not short.changes:
        yield "no single change that is known, nor two of them, would make it fit"
    for change, words in zip(short.changes, ("cheapest change", "on as many GPUs"), strict=False):
        yield f"{words}: {' '.join(change.overrides)}"
        more = 100 * (change.gpu_hours - 1)
        yield (
            f"  {change.total / GB:.1f} GB on {change.gpus:,} GPUs; GPU-hours a token "
            f"{more:+.0f} %, by their bounds"
        )
        yield f"  {change.costs}"


def refusal(config: Config, short: Shortage, besides: str = "") -> ConfigError:
    """A shortage as the error of a run that shall not start.

    Args:
        config: of the run.
        short: what it lacks.
        besides: what would help too, but a change of the run.
    """
    h = Hardware.of(config.cluster)
    has = h.memory_bytes if short.place == "GPU" else h.host_memory_bytes
    fix = "kimi-pretrain plan search on more GPUs"
    if short.changes:
        change = short.changes[0]
        words = " ".join(change.overrides)
        fix = f"{words} ({change.total / GB:.1f} GB on {change.gpus:,} GPUs)"
    return ConfigError(
        f"{short.place} memory of pipeline rank {short.rank} on {h.name}",
        f"{(has + short.over) / GB:.1f} GB",
        f"{short.over / GB:.1f} GB more than the {has / GB:g} there are; most of it is "
        f"{LABELS[short.largest]}",
        f"{fix}{besides}",
    )


def plan_data(plan: Plan, short: Shortage | None, budget: float) -> dict[str, Any]:
    """The plan as what JSON can hold; bytes, seconds and FLOPs unless a name says otherwise."""
    count, timeline = plan.count, plan.step.timeline
    return {
        "model": plan.config.model.name,
        "cluster": plan.hardware.name,
        "world": plan.topology.world,
        **asdict(plan.topology),
        "dp": plan.topology.dp,
        "schedule": plan.run.schedule.name,
        "vpp": plan.run.schedule.vpp,
        "microbatches": plan.run.schedule.microbatches,
        "activation": plan.config.activation.policy,
        "layers": [[r.start, r.stop - 1] for r in plan.run.layers],
        "parameters": asdict(count)
        | {
            "active_with_head": count.active_with_head,
            "active_with_both": count.active_with_both,
        },
        "memory": [asdict(rank) | {"total": rank.total} for rank in plan.memory],
        "memory_of_a_gpu": plan.hardware.memory_bytes,
        "fits": short is None,
        "shortage": None if short is None else asdict(short),
        "all_to_all": asdict(plan.all_to_all),
        "message": asdict(plan.message),
        "replicas": [asdict(replica) for replica in plan.replicas],
        "sent": [
            {"what": what, **asdict(sent), "overlaps": overlaps}
            for what, sent, overlaps in _sent_rows(plan)
        ],
        "step_tokens": plan.step_tokens,
        "flops_per_step": plan.step_tokens * plan.flops_per_token,
        "flops_per_token": plan.flops_per_token,
        "newton_schulz": plan.newton_schulz,
        "newton_schulz_share": plan.newton_schulz_share,
        "costs": asdict(plan.costs),
        "step": {
            "seconds": plan.step.seconds,
            "parts": dict(_time_rows(plan)),
            "pipeline": plan.step.pipeline,
            "reduce_scatter_exposed": plan.step.reduce_scatter,
            "optimizer": plan.step.optimizer,
            "all_gather_exposed": plan.step.all_gather,
            "bubble": timeline.bubble,
            "compute": list(timeline.busy),
            "all_to_all_exposed": list(timeline.exposed_all_to_all),
            "messages_exposed": list(timeline.exposed_p2p),
        },
        "tokens_per_gpu_second": plan.tokens_per_gpu_second,
        "mfu": plan.mfu,
        "token_budget": budget,
        "gpu_hours": plan.gpu_hours(budget),
        "days": plan.gpu_hours(budget) / plan.topology.world / 24,
    }


def _parameters(plan: Plan) -> Iterator[str]:
    count = plan.count
    for label, value in (
        ("parameters, all", count.total),
        ("  router biases, not among them", count.router_bias),
        ("  active a token, no embedding", count.active_without_embedding),
        ("  active a token, with the head", count.active_with_head),
        ("  active a token, with both", count.active_with_both),
    ):
        yield f"{label:34}{value:>22,}"
    giga = plan.flops_per_token / 1e9
    yield f"{'training FLOPs a token':34}{giga:>20.{2 if giga >= 1 else 4}f} G"
    share = f"{100 * plan.newton_schulz_share:.2f} % of them"
    yield (
        f"{'training FLOPs a step':34}{plan.step_tokens * plan.flops_per_token:>22.3e}; "
        f"Newton-Schulz {plan.newton_schulz:.2e}, {share}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    groups = [list(same) for _, same in groupby(plan.memory, key=lambda r: _row(plan, r))]
    for first in range(0, len(groups), _COLUMNS):
        part = groups[first : first + _COLUMNS]
        yield f"{'GB of a rank':24}" + "".join(f"{_ranks(group):>15}" for group in part)
        cells = [f"{_layers(plan, group[0].rank):>15}" for group in part]
        yield f"{'  layers':24}" + "".join(cells)
        for name in COMPONENTS:
            values = (f"{getattr(group[0], name) / GB:15.2f}" for group in part)
            yield f"{'  ' + LABELS[name]:24}" + "".join(values)
        yield f"{'  together':24}" + "".join(f"{group[0].total / GB:15.2f}" for group in part)
        kept = (f"{max(rank.microbatches for rank in group):15}" for group in part)
        yield f"{'  microbatches kept':24}" + "".join(kept)
        if any(rank.host for rank in plan.memory):
            host = (f"{max(rank.host for rank in group) / GB:15.2f}" for group in part)
            yield f"{'on the host, most':24}" + "".join(host)
    full = plan.fullest
    tags = sorted(full.tags.items(), key=lambda item: -item[1])
    yield f"a microbatch leaves on rank {full.rank}, GB by tag:"
    items = [f"{tag} {size / GB:.3f}" for tag, size in tags]
    for start in range(0, len(items), 5):
        yield "  " + ", ".join(items[start : start + 5])


def _sent(plan: Plan) -> Iterator[str]:
    yield f"{'a rank sends in a step':34}{'NVLink':>12}{'RDMA':>12}   overlaps"
    for label, sent, overlaps in _sent_rows(plan):
        yield f"{'  ' + label:34}{si(sent.nvlink) + 'B':>12}{si(sent.rdma) + 'B':>12}   {overlaps}"
    token = all_to_all_bytes_per_token(plan.config.model)
    yield (
        f"one dispatch: {si(plan.all_to_all.total)}B, rows of {token:,} B a token; "
        f"one message: {si(plan.message.total)}B"
    )


def _sent_rows(plan: Plan) -> Iterator[tuple[str, Bytes, str]]:
    """What the busiest rank sends in a step of each kind, and what that overlaps with."""
    busiest = max(range(len(plan.memory)), key=plan.all_to_alls)
    replica = max(plan.replicas, key=lambda r: r.reduce_scatter.total)
    pairs = "under the other microbatch" if _overlaps(plan) else "nothing: no pairs"
    yield "ep: all-to-all", plan.all_to_all.times(plan.all_to_alls(busiest)), pairs
    if plan.topology.pp > 1:
        way = plan.message.times(plan.messages(len(plan.memory) // 2))
        yield "pp: activations, gradients", way, "other actions"
    yield "dp: reduce-scatter, fp32", replica.reduce_scatter, "the last backwards"
    yield "dp: all-gather, bf16", replica.all_gather, "the next forwards"
    yield "dp: Muon's exchange, most", replica.exchange, "nothing"


def _time(plan: Plan) -> Iterator[str]:
    step = plan.step
    yield f"{'seconds of a step':34}{step.seconds:12.3f}"
    for label, seconds in _time_rows(plan):
        yield f"{'  ' + label:34}{seconds:12.3f}{100 * seconds / step.seconds:9.1f} %"


def _time_rows(plan: Plan) -> list[tuple[str, float]]:
    """The parts of a step, in seconds: of the pipeline the mean of its ranks."""
    step, timeline = plan.step, plan.step.timeline
    ranks = len(timeline.ranks)
    compute = sum(timeline.busy) / ranks
    exchange = sum(timeline.exposed_all_to_all) / ranks
    messages = sum(timeline.exposed_communication) / ranks - exchange
    idle = step.pipeline - compute - exchange - messages
    return [
        ("compute, mean of the ranks", compute),
        ("all-to-all exposed", exchange),
        ("messages exposed", messages),
        ("idle: fill, drain, uneven stages", idle),
        ("reduce-scatter exposed", step.reduce_scatter),
        ("optimizer", step.optimizer),
        ("all-gather exposed", step.all_gather),
    ]


def _speed(plan: Plan, budget: float) -> Iterator[str]:
    hours = plan.gpu_hours(budget)
    days = hours / plan.topology.world / 24
    trillion = _number(plan.gpu_hours(1e12))
    yield (
        f"{plan.tokens_per_gpu_second:,.0f} tokens/s/GPU; MFU {plan.mfu:.3f} of "
        f"{si(plan.hardware.peak)}FLOP/s; {trillion} GPU-hours a trillion tokens"
    )
    unit = "" if si(budget).endswith(" ") else " "
    yield (
        f"{si(budget)}{unit}tokens: {_number(hours)} GPU-hours, {_number(days)} days without a stop"
    )


def _number(value: float) -> str:
    """Whole where it is large, else three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _overlaps(plan: Plan) -> bool:
    return plan.run.schedule.name in ("k2", "dualpipe_v")


def _row(plan: Plan, rank: RankMemory) -> tuple[object, ...]:
    values = (round(getattr(rank, name) / 1e7) for name in COMPONENTS)
    return (*values, _layers(plan, rank.rank))


def _layers(plan: Plan, rank: int) -> str:
    return "+".join(str(len(plan.run.layers[stage])) for stage in plan.run.stages(rank))


def _ranks(group: Sequence[RankMemory]) -> str:
    first, last = group[0].rank, group[-1].rank
    return f"rank {first}" if first == last else f"ranks {first}-{last}"


def _gb(hardware: Hardware) -> str:
    return f"{hardware.memory_bytes / GB:g} GB"
