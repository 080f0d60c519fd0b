"""Who is slow beside the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

SLOW = 1.10  # times the median: where a rank is named


@dataclass(frozen=True)
class Outlier:
    """A rank that needs ``ratio`` times the median of all ranks."""

    probe: str
    rank: int
    host: str
    seconds: float
    ratio: float


def outliers(
    probe: str, seconds: Sequence[float | None], hosts: Sequence[str], slow: float = SLOW
) -> list[Outlier]:
    """The ranks at least ``slow`` times as slow as the median, slowest first.

    Args:
        probe: its name.
        seconds: [ranks]; None for one that had no part in it.
        hosts: [ranks].
        slow: above 1.
    """
    known = [value for value in seconds if value is not None]
    if len(known) < 2:
        return []
    usual = median_low(known)
    found = [
        Outlier(probe, rank, hosts[rank], value, value / usual)
        for rank, value in enumerate(seconds)
        if value is not None and value >= slow * usual
    ]
    return sorted(found, key=lambda each: -each.ratio)
