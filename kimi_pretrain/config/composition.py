"""From override strings to a checked, typed ``Config``: Hydra composes, types and rules follow."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.family import register_resolver
from kimi_pretrain.config.no_code import refuse_code
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.secrets import refuse_secrets
from kimi_pretrain.config.settled import settled
from kimi_pretrain.config.translate import HYDRA_ERRORS, split_override, translate
from kimi_pretrain.config.typed import build, defaults
from kimi_pretrain.config.validate import validate

PRIMARY = "config"
VERSION_BASE = "1.3"


def conf_dir() -> Path:
    """The folder of shipped YAML files: inside an installed package, or at the top of the source.

    Raises:
        FileNotFoundError: the installation holds neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{PRIMARY}.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/{PRIMARY}.yaml in {package} or beside it: broken install")


def group_options(*folders: Path) -> dict[str, list[str]]:
    """Config group -> its options, over several folders of YAML files."""
    files = sorted(f for folder in folders for f in folder.glob("*/*.yaml"))
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def register() -> None:
    """Tell Hydra and OmegaConf what conf/ relies on: the schema's keys and our resolver."""
    register_resolver()
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(defaults(Config)))


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run from Hydra overrides, as in ``["model=k2", "seed=3"]``.

    Raises:
        ConfigError: whatever is wrong with it, in one line: syntax, keys, types, options or
            a combination that cannot run.
    """
    return compose_from(overrides, PRIMARY, ())


def compose_from(overrides: Sequence[str], name: str, more_folders: Sequence[Path]) -> Config:
    """``compose`` with another primary configuration or further folders of YAML files."""
    return to_config(compose_node(overrides, name, more_folders))


def compose_node(overrides: Sequence[str], name: str, more_folders: Sequence[Path]) -> DictConfig:
    """What Hydra composes, before types and rules: it may still lack values.

    Raises:
        ConfigError: syntax, an unknown key or option, a secret, or code named in the
            configuration.
    """
    refuse_secrets(map(split_override, overrides), os.environ)
    register()
    groups = group_options(conf_dir(), *more_folders)
    try:
        _refuse_nameless_options(overrides, groups)
        return _compose(overrides, name, [conf_dir(), *more_folders])
    except HYDRA_ERRORS as error:
        raise translate(error, overrides, groups) from error


def to_config(composed: DictConfig) -> Config:
    """The typed, validated ``Config`` of a composed node (without its ``hydra`` part).

    Raises:
        ConfigError: as ``compose``.
    """
    try:
        refuse_secrets(_leaves(OmegaConf.to_container(composed)), os.environ)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            rule = "it has no default and must be set"
            raise ConfigError(missing[0], "???", rule, f"{missing[0]}=...")
        plain = OmegaConf.to_container(composed, resolve=True)
        refuse_secrets(_leaves(plain), os.environ)
    except HYDRA_ERRORS as error:
        raise translate(error, [], group_options(conf_dir())) from error
    config: Config = settled(build(Config, plain))
    validate(config)
    return config


def _refuse_nameless_options(overrides: Sequence[str], groups: Mapping[str, list[str]]) -> None:
    """Hydra takes a list of options for a group, and fails with a TypeError on numbers in it."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key in groups and isinstance(value, list) and not all(type(v) is str for v in value):
            rule = f"a group takes the name of an option: {', '.join(groups[key])}"
            raise ConfigError(key, value, rule, f"{key}={groups[key][0]}")


def _compose(overrides: Sequence[str], name: str, folders: Sequence[Path]) -> DictConfig:
    """Hydra's own composition; a Hydra application that is running around us stays as it was."""
    primary = next((f for f in folders if (f / f"{name}.yaml").is_file()), folders[0]).resolve()
    others = ",".join(f"'file://{f.resolve()}'" for f in folders if f.resolve() != primary)
    search = [f"hydra.searchpath=[{others}]"] if others else []
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(primary), version_base=VERSION_BASE):
            node = hydra.compose(name, [*overrides, *search], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
    refuse_code(OmegaConf.to_container(node.hydra))
    with open_dict(node):
        del node["hydra"]
    return node


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}.{index}")
    else:
        yield key, str(value)
