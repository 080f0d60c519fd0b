"""What the time of a step went to, on this rank and on all of them side by side.

Pure functions on numbers: ``parallel.stopwatch`` measures, ``train.comparison`` gathers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

# The parts of a step, which add up to it. The last four are waits for other ranks.
OWN = ("data", "compute", "optimizer", "offload")
WAITS = ("ep", "pp", "dp", "world")
PARTS = OWN + WAITS
# At least so much slower than the median of its stage, a rank is worth a look.
SLOW = 1.10
_NAMED = 3  # ranks that a row names as the slowest


@dataclass(frozen=True)
class Seat:
    """Where a rank is: its host, and its place in the pipeline."""

    host: str
    stage: int


def part_fields(parts: Mapping[str, float]) -> dict[str, float]:
    """The fields of a row of metrics.jsonl, one a part, in seconds."""
    return {f"{part}_seconds": parts.get(part, 0.0) for part in PARTS}


def comparison(parts: Sequence[Mapping[str, float]], seats: Sequence[Seat]) -> dict[str, Any]:
    """How the ranks spent a step: the spread of every part, and who is waited for.

    Ranks of one pipeline stage do the same work, so a rank's own seconds (``OWN``) are held
    against the median of its stage; of two ranks, against the quicker one's. Between stages,
    which differ by design, only waiting tells: whoever everyone waits for waits least.

    Args:
        parts: [ranks] seconds of a step by part.
        seats: [ranks].

    Returns:
        ``parts`` by name as smallest, median and largest; ``straggler`` (a rank) and
        ``straggler_ratio``; ``slowest``, each with the part that it is slowest in; and
        ``least_waiting``.
    """
    own = [sum(each[part] for part in OWN) for each in parts]
    waits = [sum(each[part] for part in WAITS) for each in parts]
    usually = _by_stage(own, seats)
    usual_parts = {part: _by_stage([each[part] for each in parts], seats) for part in OWN}
    ratios = [
        seconds / usually[seat.stage] if usually[seat.stage] > 0 else 1.0
        for seconds, seat in zip(own, seats, strict=True)
    ]

    def named(rank: int) -> dict[str, Any]:
        return {"rank": rank, "host": seats[rank].host, "stage": seats[rank].stage}

    def slow_in(rank: int) -> str:
        stage = seats[rank].stage
        return max(OWN, key=lambda part: parts[rank][part] - usual_parts[part][stage])

    order = sorted(range(len(parts)), key=lambda rank: (-ratios[rank], waits[rank], rank))
    patient = min(range(len(parts)), key=lambda rank: waits[rank])
    return {
        "parts": {part: spread([each[part] for each in parts]) for part in PARTS},
        "straggler": order[0],
        "straggler_ratio": ratios[order[0]],
        "slowest": [
            named(rank) | {"own_seconds": own[rank], "ratio": ratios[rank], "part": slow_in(rank)}
            for rank in order[:_NAMED]
        ],
        "least_waiting": named(patient) | {"wait_seconds": waits[patient]},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def _by_stage(values: Sequence[float], seats: Sequence[Seat]) -> dict[int, float]:
    """The median of each stage's ranks; of two, the smaller value."""
    stages: dict[int, list[float]] = {}
    for value, seat in zip(values, seats, strict=True):
        stages.setdefault(seat.stage, []).append(value)
    return {stage: median_low(found) for stage, found in stages.items()}
