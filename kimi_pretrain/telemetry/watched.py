"""A run as its newest rows tell it, whether it trains, stands still or has ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import read_saved
from kimi_pretrain.telemetry.goodput import read_launches
from kimi_pretrain.telemetry.jsonl import FILES, SUMMARY, newest_rows, summary_is_current

RECENT = 64  # steps that its pace is told from
# A run is late once no row came for so many steps' time, and at least so many seconds: an
# evaluation or a checkpoint may lie between two.
_LATE_STEPS, _LATE_SECONDS = 10, 60.0


@dataclass(frozen=True)
class Watched:
    """One look at a run directory; ``age`` is in seconds since its last step's row."""

    directory: Path
    model: str
    launches: list[dict[str, Any]]
    steps: list[dict[str, Any]]  # the newest RECENT, oldest first
    ranks: dict[str, Any] | None  # the newest comparison of ranks
    evaluation: dict[str, Any] | None
    ended: bool
    age: float

    @property
    def total_steps(self) -> int | None:
        """Of the whole run, if a start of it has said so."""
        return self.launches[-1]["total_steps"] if self.launches else None

    @property
    def late(self) -> bool:
        """Whether the next step should have come long ago."""
        if self.ended or not self.steps:
            return False
        usual = median(float(row["step_seconds"]) for row in self.steps)
        return self.age > max(_LATE_STEPS * usual, _LATE_SECONDS)


def look(run_dir: Path, now: float) -> Watched:
    """Read what a run has last written; cheap however long it is.

    Args:
        run_dir: of a run that trains or has trained.
        now: in seconds since the epoch.

    Raises:
        ConfigError: it is no run's directory.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        rule = "a run directory holds config.yaml"
        raise ConfigError("top", str(run_dir), rule, "the run_dir that training printed")
    metrics = run_dir / FILES["step"]
    steps = newest_rows(metrics, RECENT)
    summary = run_dir / SUMMARY
    return Watched(
        directory=run_dir,
        model=str(read_saved(config)["model"]["name"]),
        launches=read_launches(run_dir),
        steps=steps,
        ranks=_last(newest_rows(run_dir / FILES["ranks"], 1)),
        evaluation=_last(newest_rows(run_dir / FILES["eval"], 1)),
        ended=summary.exists()
        and summary_is_current(json.loads(summary.read_bytes()), _last(steps)),
        age=max(0.0, now - metrics.stat().st_mtime) if steps else 0.0,
    )


def _last(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return rows[-1] if rows else None
