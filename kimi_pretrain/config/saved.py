"""The configuration a run directory was started with, kept beside its checkpoints."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config

# What a checkpoint's tensors and its count of samples mean. Everything else may change
# between two starts: a longer schedule, another interval, another logger.
IDENTITY = ("model", "data", "precision", "seed", "optimizer.name", "schedule.global_batch_size")
_NOT_IDENTITY = {"data.root"}  # a corpus may move


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
    beside.replace(path)


def read_saved(path: Path) -> dict[str, Any]:
    """The configuration that `save_config` wrote, as nested dictionaries.

    Raises:
        ConfigError: the file is not one.
    """
    saved = yaml.safe_load(path.read_text())
    if not isinstance(saved, dict):
        raise ConfigError(
            str(path), saved, "a saved configuration is a mapping of keys", "another run_dir"
        )
    return saved


def require_same_run(config: Config, path: Path) -> None:
    """Raise ConfigError when `config` is not the run that was saved at `path`."""
    saved = _flatten(read_saved(path))
    current = flat(config)
    for key in sorted(saved.keys() | current.keys()):
        belongs = any(key == identity or key.startswith(identity + ".") for identity in IDENTITY)
        if belongs and key not in _NOT_IDENTITY and saved.get(key) != current.get(key):
            raise ConfigError(
                f"{key} of a resumed run",
                current.get(key),
                f"{path.parent} was started with {saved.get(key)!r} and its checkpoints mean that",
                f"{key}={saved.get(key)}, or another run_dir",
            )


def flat(config: Config) -> dict[str, Any]:
    """Every value of the configuration by its dotted key; lists are values."""
    return _flatten(_plain(asdict(config)))


def _plain(value: Any) -> Any:
    """Only what YAML has words for: tuples become lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted key; lists are leaves."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in _flatten(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }
