"""A row as named numbers, for services that draw curves and take no arrays."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Names every number of a row ``<kind>/<key>``, nested mappings by further slashes.

    The per-layer arrays become one number a layer, since a thousand curves a run help
    nobody: the largest logit of its heads, the share of its heads that were clipped, and
    its fullest expert's load over the mean. ``step`` is the axis, not a curve; texts and
    other arrays stay in the files.
    """
    return dict(_named(kind, {key: value for key, value in values.items() if key != "step"}))


def _named(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _named(name, value)
        elif isinstance(value, bool | int | float):
            yield name, float(value)
        elif key in _PER_LAYER:
            label, reduce = _PER_LAYER[key]
            for layer, row in enumerate(value):
                yield f"{prefix}/{label}/{layer:02d}", reduce(row)


def _max(row: list[float]) -> float:
    return float(max(row))


def _mean(row: list[float]) -> float:
    return float(sum(row) / len(row))


def _max_over_mean(row: list[float]) -> float:
    mean = _mean(row)
    return _max(row) / mean if mean else float("nan")


# Rows of expert_load are numbered among the MoE layers, the other two among all layers.
_PER_LAYER: Mapping[str, tuple[str, Callable[[list[float]], float]]] = {
    "max_logits": ("max_logit", _max),
    "clipped": ("clipped_share", _mean),
    "expert_load": ("load_max_over_mean", _max_over_mean),
}
