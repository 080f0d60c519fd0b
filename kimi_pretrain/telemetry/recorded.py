"""A run as its files tell it, read once and turned into arrays."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import read_saved
from kimi_pretrain.telemetry.jsonl import FILES, SUMMARY, read_rows, summary_is_current

Array = NDArray[np.float64]

# Rows of layers.jsonl that are read at most, evenly spread: more columns than a plot has
# pixels show nothing further, and K2's rows are half a megabyte each.
LAYER_ROWS = 500


@dataclass(frozen=True)
class Table:
    """Rows as columns: ``table["loss"]`` is float64 [rows], nan where a row lacks the key."""

    columns: dict[str, Array]
    rows: int

    def __getitem__(self, key: str) -> Array:
        return self.columns.get(key, np.full(self.rows, np.nan))

    def has(self, key: str) -> bool:
        """Whether any row has a finite value under ``key``."""
        return bool(np.isfinite(self[key]).any())


@dataclass(frozen=True)
class Heads:
    """The largest attention logit of every head: ``steps`` [T], ``logits`` [T, layers, heads].

    Evaluations know it exactly; rows of training steps hold an upper bound for every head
    that stayed below tau, and serve only where there is no evaluation.
    """

    steps: Array
    logits: Array
    exact: bool


@dataclass(frozen=True)
class Load:
    """The load of every expert as a multiple of an even share, which is 1.

    ``steps`` [T], ``ratio`` [T, MoE layers, experts]; the first MoE layer is ``first_layer``.
    """

    steps: Array
    ratio: Array
    first_layer: int


@dataclass(frozen=True)
class Recorded:
    """Everything a run directory says about its run."""

    directory: Path
    config: dict[str, Any]
    config_text: str  # the same as it lies in the file
    steps: Table
    evals: Table
    domains: dict[str, Array]  # held-out loss by domain, [evaluations]
    heads: Heads | None
    load: Load | None  # None for a dense model
    summary: dict[str, Any] | None  # of the run as it stands; None while it is not finished

    @cached_property
    def tau(self) -> float | None:
        """The QK-Clip threshold, None where it was off."""
        value = self.config["optimizer"]["qk_clip_threshold"]
        return None if value is None else float(value)


def read_run(run_dir: Path) -> Recorded:
    """Reads a run that is finished, running or was killed at any moment.

    Evaluations, per-layer rows and the summary may be missing; the configuration and one
    step may not.

    Raises:
        ConfigError: no such directory, no run in it, no step yet, or a damaged file.
    """
    if not run_dir.is_dir():
        raise _no_run(run_dir, "it is the directory of a run", "a directory that train made")
    config = run_dir / "config.yaml"
    if not config.exists():
        raise _no_run(run_dir, "a run directory holds config.yaml", "a directory that train made")
    rows = list(read_rows(run_dir / FILES["step"]))
    if not rows:
        raise _no_run(
            run_dir, f"{FILES['step']} holds at least one step", "again after the first step"
        )
    evals = list(read_rows(run_dir / FILES["eval"]))
    values = read_saved(config)
    text = config.read_text(encoding="utf-8")
    layers = _thinned(run_dir / FILES["layers"])
    return Recorded(
        directory=run_dir,
        config=values,
        config_text=text,
        steps=_table(rows),
        evals=_table(evals),
        domains=_domains(evals),
        heads=_heads(evals, exact=True) or _heads(layers, exact=False),
        load=_load(layers, values["model"]["first_k_dense_replace"]),
        summary=_summary(run_dir / SUMMARY, rows[-1]),
    )


def _no_run(run_dir: Path, rule: str, fix: str) -> ConfigError:
    return ConfigError(what="run to report on", value=str(run_dir), rule=rule, fix=fix)


def _table(rows: list[dict[str, Any]]) -> Table:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    return Table({key: _column(row.get(key) for row in rows) for key in keys}, len(rows))


def _domains(evals: list[dict[str, Any]]) -> dict[str, Array]:
    names = dict.fromkeys(name for row in evals for name in row.get("domains", {}))
    return {name: _column(row.get("domains", {}).get(name) for row in evals) for name in names}


def _column(values: Iterable[Any]) -> Array:
    return np.array([float(v) if _is_number(v) else np.nan for v in values], dtype=np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _thinned(path: Path) -> list[dict[str, Any]]:
    """Rows of layers.jsonl, LAYER_ROWS at most."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    return list(read_rows(path, _spread(lines)))


def _heads(rows: list[dict[str, Any]], *, exact: bool) -> Heads | None:
    rows = [row for row in rows if row.get("max_logits")]
    if not rows:
        return None
    logits = np.array([row["max_logits"] for row in rows], dtype=np.float64)
    return Heads(_column(row["step"] for row in rows), logits, exact)


def _load(rows: list[dict[str, Any]], first_layer: int) -> Load | None:
    rows = [row for row in rows if row.get("expert_load")]
    if not rows:
        return None
    load = np.array([row["expert_load"] for row in rows], dtype=np.float64)
    mean = load.mean(axis=-1, keepdims=True)
    ratio = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return Load(_column(row["step"] for row in rows), ratio, first_layer)


def _spread(lines: int) -> Callable[[int], bool]:
    """Chooses at most LAYER_ROWS of the lines, the first and the last among them."""
    chosen = set(np.linspace(0, lines - 1, min(lines, LAYER_ROWS)).round().astype(int).tolist())
    return chosen.__contains__


def _summary(path: Path, last_step: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    summary = json.loads(path.read_bytes())
    return summary if summary_is_current(summary, last_step) else None
