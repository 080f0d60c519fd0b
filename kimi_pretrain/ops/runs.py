"""Which consecutive groups of rows are multiplied together; without torch, for plans too."""

from collections.abc import Sequence
from dataclasses import dataclass

# What a call costs beside its arithmetic, as arithmetic a core does in that time, by dtype.
CALL_FLOPS = {"bfloat16": 4e6, "float32": 1e6, "float64": 5e5}
_LONGEST_RUN = 16
# Rows of a padded group are a multiple of this: odd sizes slow bf16 products down.
_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class Run:
    """Groups ``first .. last - 1``, each with ``rows`` rows, multiplied together."""

    first: int
    last: int
    rows: int

    @property
    def total(self) -> int:
        """Rows of all its groups, padding among them."""
        return (self.last - self.first) * self.rows


def cheapest_runs(sizes: Sequence[int], call_rows: float) -> tuple[Run, ...]:
    """Runs of least total cost, a call counting as much as ``call_rows`` rows.

    Dynamic programming over the end of the last run.
    """
    groups = len(sizes)
    cost = [0.0] + [float("inf")] * groups
    start = [0] * (groups + 1)
    height = [0] * (groups + 1)  # rows of the run that ends here
    for first in range(groups):
        largest, base = 0, cost[first] + call_rows
        for last in range(first + 1, min(groups, first + _LONGEST_RUN) + 1):
            largest = max(largest, sizes[last - 1])
            rows = largest if last == first + 1 else largest + -largest % _ROW_MULTIPLE
            total = base + rows * (last - first)
            if total < cost[last]:
                cost[last], start[last], height[last] = total, first, rows
    runs, last = [], groups
    while last:
        runs.append(Run(start[last], last, height[last]))
        last = start[last]
    return tuple(runs[::-1])
