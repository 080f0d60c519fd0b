"""Schedules as text and as JSON (the format of torch.distributed.pipelining: `3F4`, `7I3`)."""

import json
import re
from collections.abc import Sequence

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import BACKWARD, Action, Kind, Node, Overlap, Schedule, leaves
from kimi_pretrain.pipeline.errors import ScheduleError

_ACTION = re.compile(
    rf"(\d{{1,9}})({'|'.join(sorted(Kind, key=len, reverse=True))})(\d{{1,9}})", re.ASCII
)
_OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


def schedule_from_rows(rows: Sequence[str], name: str) -> Schedule:
    """See `Schedule.from_text`. An empty cell (torch writes one for a bubble) means nothing."""
    ranks = tuple(_row(row, rank, name) for rank, row in enumerate(rows))
    placement = _placement(ranks, name)
    microbatches = {leaf.microbatch for row in ranks for node in row for leaf in leaves(node)}
    missing = next(index for index in range(len(microbatches) + 1) if index not in microbatches)
    if missing < len(microbatches):
        raise ScheduleError(
            name, None, None, max(microbatches), f"microbatch {missing} is absent", "all from 0 on"
        )
    return Schedule(
        name, len(ranks), len(placement) // len(ranks), len(microbatches), ranks, placement
    )


def _row(text: str, rank: int, name: str) -> tuple[Node, ...]:
    cells = (cell.strip() for cell in text.split(","))
    return tuple(_node(cell, rank, position, name) for position, cell in enumerate(cells) if cell)


def _node(cell: str, rank: int, position: int, name: str) -> Node:
    pair = _OVERLAP.fullmatch(cell)
    if pair is None:
        return _action(cell, rank, position, name)
    forward, backward = (_action(part.strip(), rank, position, name) for part in pair.groups())
    if forward.kind is not Kind.F or backward.kind not in BACKWARD:
        rule = "a pair is a forward and a backward (I or B), in this order"
        raise ScheduleError(name, rank, position, cell, rule, "such as (3F4;7I3)OVERLAP_F_B")
    return Overlap(forward, backward)


def _action(text: str, rank: int, position: int, name: str) -> Action:
    match = _ACTION.fullmatch(text)
    if match is None:
        rule = f"an action is a stage, one of {', '.join(Kind)}, and a microbatch"
        raise ScheduleError(name, rank, position, text, rule, "such as 3F4")
    stage, kind, microbatch = match.groups()
    return Action(Kind(kind), int(stage), int(microbatch))


def _placement(ranks: tuple[tuple[Node, ...], ...], name: str) -> tuple[int, ...]:
    """The rank of each stage: the one that acts for it."""
    holder: dict[int, int] = {}
    for rank, row in enumerate(ranks):
        for position, node in enumerate(row):
            for leaf in leaves(node):
                if holder.setdefault(leaf.stage, rank) != rank:
                    rule = f"stage {leaf.stage} is on rank {holder[leaf.stage]} already"
                    raise ScheduleError(name, rank, position, str(leaf), rule, "one rank a stage")
    if not holder:
        raise ScheduleError(name, None, None, len(ranks), "no rank does anything", "1F0,1B0")
    missing = next(stage for stage in range(len(holder) + 1) if stage not in holder)
    if missing < len(holder):
        rule = f"no rank acts for stage {missing}"
        raise ScheduleError(name, None, None, max(holder), rule, "all stages from 0 on")
    held = [list(holder.values()).count(rank) for rank in range(len(ranks))]
    if len(set(held)) > 1:
        raise ScheduleError(
            name, held.index(min(held)), None, held, "every rank holds as many stages", "move one"
        )
    return tuple(holder[stage] for stage in range(len(holder)))


_FIELDS = ("name", "pp", "vpp", "microbatches", "placement", "in_flight", "ranks")


def schedule_to_json(schedule: Schedule) -> str:
    """See `Schedule.to_json`."""
    plain = {
        "name": schedule.name,
        "pp": schedule.pp,
        "vpp": schedule.vpp,
        "microbatches": schedule.microbatches,
        "placement": list(schedule.placement),
        "in_flight": None if schedule.in_flight is None else list(schedule.in_flight),
        "ranks": schedule.to_text(),
    }
    return json.dumps(plain, indent=1)


def schedule_from_json(text: str) -> Schedule:
    """See `Schedule.from_json`."""
    try:
        plain = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(
            "schedule", text[:40], f"it is JSON ({error})", "Schedule.to_json"
        ) from None
    if not isinstance(plain, dict) or set(plain) != set(_FIELDS):
        found = sorted(plain) if isinstance(plain, dict) else type(plain).__name__
        raise ConfigError(
            "schedule", found, "a JSON object of the named fields", ", ".join(_FIELDS)
        )
    name, rows, bound = plain["name"], plain["ranks"], plain["in_flight"]
    if not isinstance(name, str):
        raise ConfigError("schedule.name", name, "a name is text", '"k2"')
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise ConfigError(
            "schedule.ranks", type(rows).__name__, "a list of rows of text", '"0F0,0B0"'
        )
    read = schedule_from_rows(rows, name)
    for key in ("pp", "vpp", "microbatches", "placement"):
        meant = getattr(read, key)
        meant = list(meant) if isinstance(meant, tuple) else meant
        if plain[key] != meant or isinstance(plain[key], bool):
            raise ConfigError(f"schedule.{key}", plain[key], "it is what the rows say", str(meant))
    if bound is None:
        return read
    whole = isinstance(bound, list) and all(type(most) is int and most >= 0 for most in bound)
    if not whole or len(bound) != read.pp:
        raise ConfigError("schedule.in_flight", bound, "one number a rank, or null", "null")
    return Schedule(
        name, read.pp, read.vpp, read.microbatches, read.ranks, read.placement, tuple(bound)
    )
