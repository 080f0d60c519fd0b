"""From plain values (what YAML and the command line give) to the dataclasses of the schema.

Hydra composes untyped nodes; types are applied here, once, to the result. That way every
wrong type and every unknown key is the same four-part line with its full dotted key, no
matter whether it came from a file or from an override.
"""

import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as REQUIRED
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_key

# kind -> (what the rule calls it, an example for the fix)
_KINDS: dict[type, tuple[str, str]] = {
    bool: ("true or false", "true"),
    int: ("an integer", "1"),
    float: ("a number", "0.1"),
    str: ("text", "name"),
    list: ("a list", "[...]"),
    dict: ("a group of keys", "{...}"),
}


def defaults(schema: type) -> dict[str, Any]:
    """The schema's keys with their default values as plain containers; ``???`` where none."""
    result: dict[str, Any] = {}
    for name, annotation in get_type_hints(schema).items():
        field = schema.__dataclass_fields__[name]  # type: ignore[attr-defined]
        if is_dataclass(annotation):
            result[name] = defaults(annotation)  # type: ignore[arg-type]
        elif field.default_factory is not REQUIRED:
            result[name] = field.default_factory()
        else:
            value = field.default
            result[name] = list(value) if isinstance(value, tuple) else value
    return result


def dotted_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of the schema by its full name; keys inside lists and dicts are left out."""
    for name, annotation in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        inner = next((a for a in (annotation, *get_args(annotation)) if is_dataclass(a)), None)
        holds_one = inner is not None and get_origin(annotation) in (None, Union, types.UnionType)
        if inner is not None and holds_one:
            if annotation is not inner:
                yield key  # an optional group can be set to null as a whole
            yield from dotted_keys(inner, f"{key}.")  # type: ignore[arg-type]
        else:
            yield key


def build(schema: type, value: Any, key: str = "") -> Any:
    """An instance of the dataclass ``schema`` from the plain container ``value``.

    Raises:
        ConfigError: an unknown key, a missing value or a value of the wrong type; the
            line carries the full dotted key.
    """
    if not isinstance(value, dict):
        raise _wrong_type(key, value, dict)
    hints = get_type_hints(schema)
    for name in value:
        if name not in hints:
            path = f"{key}.{name}" if key else str(name)
            known = dotted_keys(schema, f"{key}." if key else "")
            raise unknown_key(path, value[name], [*known, *(() if key else hints)])
    return schema(
        **{
            field.name: _convert(
                hints[field.name],
                value.get(field.name, MISSING),
                f"{key}.{field.name}" if key else field.name,
            )
            for field in fields(schema)
            if field.name in value or field.default is MISSING
        }
    )


def unknown_key(key: str, value: object, known: Sequence[str]) -> ConfigError:
    """The error line for a key that does not exist, with the closest one that does."""
    closest = nearest_key(key, known)
    scalar = value if isinstance(value, str | int | float) else "..."
    return ConfigError(key, value, f"no such key; the closest is {closest}", f"{closest}={scalar}")


def _convert(annotation: Any, value: Any, key: str) -> Any:
    if isinstance(value, str) and value == MISSING:
        example = _KINDS.get(annotation, ("", "..."))[1]
        raise ConfigError(key, value, "it has no default and must be set", f"{key}={example}")
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (annotation,) = (a for a in arguments if a is not type(None))
        return _convert(annotation, value, key)
    if origin is list or origin is tuple:
        return _convert_sequence(origin, arguments, value, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(key, value, dict)
        inner = arguments[1]
        return {str(name): _convert(inner, item, f"{key}.{name}") for name, item in value.items()}
    if is_dataclass(annotation):
        return build(annotation, value, key)  # type: ignore[arg-type]
    return _convert_scalar(annotation, value, key)


def _convert_sequence(origin: type, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type(key, value, list)
    if origin is list:
        return [_convert(arguments[0], item, f"{key}.{i}") for i, item in enumerate(value)]
    if len(value) != len(arguments):
        rule = f"it holds {len(arguments)} values"
        raise ConfigError(key, value, rule, f"{key}=[{', '.join(['...'] * len(arguments))}]")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_convert(argument, item, f"{key}.{i}") for i, (argument, item) in pairs)


def _convert_scalar(kind: type, value: Any, key: str) -> bool | int | float | str:
    """Text that spells a number or a truth value is taken as one: ``${oc.env:X}`` is text."""
    truth = {"true": True, "false": False}.get(str(value).lower())
    if kind is bool and truth is not None:
        return truth
    if kind is str and isinstance(value, str | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if kind in (int, float) and isinstance(value, str | int | float) and truth is None:
        return _number(kind, value, key)
    raise _wrong_type(key, value, kind)


def _number(kind: type, value: str | int | float, key: str) -> int | float:
    try:
        number = int(value) if kind is int else float(value)
    except (ValueError, OverflowError) as error:  # abc, 1.5 as text, infinity, 10**400
        raise _wrong_type(key, value, kind) from error
    if kind is int and isinstance(value, float) and number != value:
        raise ConfigError(key, value, "it must be an integer", f"{key}={round(value)}")
    return number


def _wrong_type(key: str, value: object, kind: type) -> ConfigError:
    name, example = _KINDS[kind]
    what = key or "the configuration"
    return ConfigError(what, value, f"it must be {name}", f"{key}={example}")
