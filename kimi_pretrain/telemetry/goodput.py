"""Goodput: the share of a run's life in which it took steps that count.

A run's life begins with its first start and goes on while it is down. Steps that a restart
takes again count once, so what a failure cost is lost: the steps since the last checkpoint,
the time until somebody started it anew, start-up. So are checkpoints and evaluations that hold
the loop up.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_pretrain.telemetry.jsonl import FILES, append_row, read_rows

LAUNCHES = "launches.jsonl"


class Goodput:
    """Keeps count from the first start of a run directory on."""

    def __init__(
        self, first_launch: float, productive: float, clock: Callable[[], float] = time.time
    ) -> None:
        """A count.

        Args:
            first_launch: when the run was first started, by ``clock``.
            productive: seconds of the steps that are recorded.
            clock: seconds since the epoch.
        """
        self._first, self.productive, self._clock = first_launch, productive, clock

    def step(self, seconds: float) -> float:
        """One more step is done; the share of the run's life so far."""
        self.productive += seconds
        return share(self.productive, self._clock() - self._first)


def share(productive: float, life: float) -> float:
    """Productive seconds over all, 0 to 1; a clock that was set back must not give more."""
    return min(1.0, productive / life) if life > 0 else 1.0


def launched(
    run_dir: Path,
    began: float,
    *,
    ranks: int,
    first_step: int,
    total_steps: int,
) -> Goodput:
    """Note a start in ``launches.jsonl`` and go on counting where the run stands.

    Called after rows past ``first_step`` have been cut off. A start of a run that is complete
    takes no step and is not noted.

    Args:
        run_dir: the run's.
        began: when this start began, in seconds since the epoch.
        ranks: how many train.
        first_step: steps that are done.
        total_steps: steps of the whole run.
    """
    launches = read_launches(run_dir)
    if not launches or first_step < total_steps:
        row = {"time": began, "ranks": ranks, "first_step": first_step, "total_steps": total_steps}
        append_row(run_dir / LAUNCHES, row)
        launches.append(row)
    return Goodput(launches[0]["time"], productive_seconds(run_dir))


def read_launches(run_dir: Path) -> list[dict[str, Any]]:
    """One row a start, oldest first: ``time``, ``ranks``, ``first_step``, ``total_steps``."""
    return list(read_rows(run_dir / LAUNCHES))


def productive_seconds(run_dir: Path) -> float:
    """Of the steps that are recorded."""
    return sum(float(row["step_seconds"]) for row in read_rows(run_dir / FILES["step"]))
