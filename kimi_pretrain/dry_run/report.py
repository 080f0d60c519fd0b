"""A dry run beside its plan, as text of at most 100 columns or as plain data for JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kimi_pretrain.dry_run.compare import TOLERANCE, Row
from kimi_pretrain.dry_run.rank import RankRun
from kimi_pretrain.plan.layout_table import si
from kimi_pretrain.plan.run_plan import Plan

Compared = tuple[RankRun, Sequence[Row]]
_NOT_PLANNED = ("all_reduce", "counts", "broadcast")


def head_lines(plan: Plan, notes: Sequence[str]) -> Iterator[str]:
    """What is run, and what is not."""
    topology, schedule = plan.topology, plan.run.schedule
    yield (
        f"dry run of {plan.config.model.name} on {topology.world:,} ranks = edp {topology.edp} x "
        f"pp {topology.pp} x ep {topology.ep}"
    )
    yield (
        f"schedule {schedule.name}, vpp {schedule.vpp}, {schedule.microbatches} microbatches; "
        f"activation {plan.config.activation.policy}; balanced routing, all heads clipped"
    )
    yield from (f"note: {note}" for note in notes)


def rank_lines(run: RankRun, rows: Sequence[Row]) -> Iterator[str]:
    """One rank: what was counted, what is planned, and by how much they differ."""
    at = run.at
    yield (
        f"rank {run.rank:,}: edp {at.edp}, pp {at.pp}, ep {at.ep}; {run.nodes:,} actions, "
        f"{run.operations:,} operations, {run.clipped} heads clipped; {run.cpu_seconds:.1f} CPU s"
    )
    yield f"{'':34}{'counted':>14}{'planned':>14}{'difference':>13}"
    for row in rows:
        remark = " at most" if row.bound else ""
        yield (
            f"{'  ' + row.what:34}{si(row.counted) + 'B':>14}{si(row.planned) + 'B':>14}"
            f"{100 * row.difference:11.3f} %{remark}{'' if row.agrees else '   DIFFERS'}"
        )
    others = sum(sent.get(name, 0) for sent in run.sent.values() for name in _NOT_PLANNED)
    yield f"  not planned: {si(others)}B of all-reduces and counts"
    yield f"  alive at most, temporaries of the reference operations included: {si(run.peak)}B"


def dry_run_data(compared: Sequence[Compared], notes: Sequence[str]) -> dict[str, Any]:
    """All of it as what JSON can hold; bytes and seconds."""
    return {
        "notes": list(notes),
        "tolerance": TOLERANCE,
        "ranks": [
            asdict(run)
            | {
                "rows": [
                    asdict(row) | {"difference": row.difference, "agrees": row.agrees}
                    for row in rows
                ]
            }
            for run, rows in compared
        ],
    }
