"""Parameter groups: which parameters and settings make sense."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.optim.orthogonalize import coefficient_table
from kimi_pretrain.optim.who import uses_muon as uses_muon

Group = dict[str, Any]

# key -> (lowest value, value it stays below, a sound one)
_RANGES = {
    "lr": (0.0, float("inf"), 2e-4),
    "weight_decay": (0.0, float("inf"), 0.1),
    "momentum": (0.0, 1.0, 0.95),
    "eps": (0.0, float("inf"), 1e-8),
    "update_rms": (0.0, float("inf"), 0.2),
}


def require_named(entries: Any, taken: Iterable[str]) -> list[tuple[str, Tensor]]:
    """The (name, parameter) pairs of a group, each name new.

    Raises:
        ConfigError: anything else than pairs, a name for the second time, or a parameter
            that is not real floating point.
    """
    known = set(taken)
    named: list[tuple[str, Tensor]] = []
    for entry in [entries] if isinstance(entries, Tensor) else entries:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ConfigError(
                "MuonClip's parameters",
                type(entry).__name__,
                "Muon or AdamW is chosen by name, so they come as (name, parameter) pairs",
                "MuonClip(model.named_parameters(), ...)",
            )
        name, parameter = entry
        if name in known:
            rule = "a name stands for one parameter"
            raise ConfigError("MuonClip's parameters", name, rule, f"other.{name}")
        if not parameter.is_floating_point():
            rule = "a weight is real and floating point"
            raise ConfigError(f"dtype of {name}", str(parameter.dtype), rule, "torch.float32")
        known.add(name)
        named.append((name, parameter))
    return named


def require_sound(group: Group) -> None:
    """Check a group's settings; its ``params`` are (name, parameter) pairs.

    Raises:
        ConfigError: a setting out of its range, or Muon for something one-dimensional.
    """
    for key, (low, high, sound) in _RANGES.items():
        if not low <= float(group[key]) < high:
            raise ConfigError(key, float(group[key]), f"it lies in [{low}, {high})", str(sound))
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ConfigError("betas", group["betas"], "both lie in [0, 1)", "(0.9, 0.95)")
    coefficient_table(group["ns_coefficients"])
    if group["use_muon"]:
        for name, parameter in group["params"]:
            if parameter.ndim < 2:
                rule = "Muon orthogonalises matrices"
                raise ConfigError(f"shape of {name}", list(parameter.shape), rule, "use_muon=None")


def require_same_names(groups: list[Group], saved: list[Group]) -> None:
    """Check that a saved state belongs to these parameters; it is matched by position.

    Raises:
        ConfigError: names were saved and are others, or in another order.
    """
    for group, old in zip(groups, saved, strict=False):
        for name, was in zip(group["param_names"], old.get("param_names", ()), strict=False):
            if name != was:
                raise ConfigError(
                    "names in the optimizer's state_dict",
                    was,
                    f"a state belongs to the same parameters in the same order, here {name}",
                    "the model and groups it was saved with",
                )
