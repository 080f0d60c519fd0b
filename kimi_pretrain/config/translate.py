"""Hydra's and OmegaConf's exceptions as our one line of four parts."""

import re
from collections.abc import Iterator, Mapping, Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.typed import dotted_keys, unknown_key

# What composing can raise for a user's mistake. Hydra raises bare ValueErrors for some.
HYDRA_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)

Groups = Mapping[str, Sequence[str]]  # config group -> its options


def split_override(override: str) -> tuple[str, str]:
    """(key, value) of an override, without Hydra's ``+``, ``++`` and ``~``."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def translate(error: Exception, overrides: Sequence[str], groups: Groups) -> ConfigError:
    """The line for an exception that composing ``overrides`` raised."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ConfigError):
            return cause
        if isinstance(cause, OverrideParseException):
            return _unreadable(cause.override)
        if isinstance(cause, YAMLError):
            return _not_yaml(cause)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file is not None:
            return _missing_option(cause.missing_cfg_file, cause.options or (), groups)
    return (
        _bad_override(error, overrides, groups)
        or _bad_place(causes, overrides)
        or ConfigError(
            " ".join(overrides) or "the configuration",
            _first_line(error),
            "Hydra cannot compose it",
            "one change at a time, with kimi-pretrain train --cfg job",
        )
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unreadable(override: str) -> ConfigError:
    rule = "it is not Hydra's form KEY=VALUE"
    fix = "'KEY=VALUE' in shell quotes where the value holds spaces, brackets or ${...}"
    return ConfigError("override", override, rule, fix)


def _not_yaml(error: YAMLError) -> ConfigError:
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    place = f"{mark.name}:{mark.line + 1}" if mark is not None else "a configuration file"
    return ConfigError(place, _first_line(error), "the file is not YAML", "mending that line")


def _missing_option(path: str, options: Sequence[str], groups: Groups) -> ConfigError:
    group, _, option = path.rpartition("/")
    options = options or groups.get(group, ())
    if not options:
        rule = "there is no such configuration file"
        return ConfigError(group or "--config-name", option, rule, "--config-name=config")
    rule = f"no such option; there are {', '.join(options)}"
    return ConfigError(group, option, rule, f"{group}={nearest_name(option, options)}")


def _bad_override(error: Exception, overrides: Sequence[str], groups: Groups) -> ConfigError | None:
    """The first override with a key that does not exist, or a group set to no option of it."""
    keys = list(dotted_keys(Config))
    for override in overrides:
        key, value = split_override(override)
        if not key:
            return _unreadable(override)
        if key in groups:
            if value not in groups[key] and not override.startswith("~"):
                return _missing_option(f"{key}/{value}", groups[key], groups)
        elif not _is_hydras(key) and not _exists(key, keys):
            return unknown_key(key, value, [*keys, *groups])
        elif "," in value and f"'{override}'" in str(error):
            rule = "several values make a sweep"
            return ConfigError(key, value, rule, f"-m {override}, or {key}=[{value}] for a list")
    return None


def _is_hydras(key: str) -> bool:
    return re.match(r"hydra\b", key) is not None


def _exists(key: str, keys: Sequence[str]) -> bool:
    """Whether the schema has ``key``, a group of that name, or a list or dict it lies in."""
    return any(
        known == key or known.startswith(f"{key}.") or key.startswith(f"{known}.") for known in keys
    )


def _bad_place(causes: Sequence[BaseException], overrides: Sequence[str]) -> ConfigError | None:
    """An error of OmegaConf at a known key: an entry that is not there, an interpolation."""
    given = dict(map(split_override, overrides))
    for cause in causes:
        place = getattr(cause, "full_key", None)
        if not isinstance(cause, OmegaConfBaseException) or not place:
            continue
        key = re.sub(r"\[(\d+)\]", r".\1", str(place))
        for override in overrides:
            name, value = split_override(override)
            if "not in struct" in str(cause) and (name + ".").startswith(key + "."):
                return _absent_entry(name, value, override)
        value = given.get(key, cause.value if cause.value is not None else "an interpolation")
        return ConfigError(key, value, _first_line(cause), f"{key}=VALUE")
    return None


def _absent_entry(key: str, value: str, override: str) -> ConfigError:
    """An override inside a dict that has no such entry, or inside an optional group at null."""
    group, _, name = key.rpartition(".")
    if key in dotted_keys(Config):
        return ConfigError(key, value, f"{group} is null", f"'{group}={{{name}: {value}}}'")
    return ConfigError(key, value, "there is no such entry yet and + adds one", f"+{override}")
