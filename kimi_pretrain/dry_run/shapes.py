"""What operations on tensors without memory give, each found once.

torch finds the shape of a result in Python, which for many operations takes ten times as long as
to look up what operands of the same shapes gave before; and every microbatch repeats the last.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Effect(Enum):
    """What an operation does, as its schema tells."""

    VIEWS = auto()  # its results share an operand's memory
    WRITES = auto()  # it returns the one operand that it writes into
    MAKES = auto()  # it makes new tensors and changes nothing
    ELSE = auto()


_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides, dtype
_Find = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Operation:
    """An overload of an operation, and its results that are known, by what decides their shapes.

    An operation that writes or makes is called once on tensors of device meta, then repeated.
    """

    def __init__(self, func: Any) -> None:
        self.func = func
        self.does = effect(func)
        self._written = written_by(func)
        self._known: dict[Any, tuple[_Spec, ...]] = {}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, to be repeated, as if its real operands were unknown too."""
        key = _call_key(args, kwargs)
        result = self.func(*forgotten(args), **forgotten(kwargs))
        results = result if isinstance(result, tuple) else (result,)
        if key == _call_key(args, kwargs):  # no operand was resized
            self._known[key] = tuple((x.shape, x.stride(), x.dtype) for x in results)
        return result

    def repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``call`` gave for operands of the same shapes; NotImplemented where it gave none."""
        known = self._known.get(_call_key(args, kwargs))
        if known is None:
            return NotImplemented
        if self._written is not None:
            return self._written(args, kwargs)
        if len(known) == 1:
            ((shape, stride, dtype),) = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in known
        )


class Operations:
    """Every operation that was met, by the identity of its overload.

    torch has one object for an overload, whose hash is a call of Python: a microsecond for each of
    millions.
    """

    def __init__(self) -> None:
        self._met: dict[int, Operation] = {}

    def of(self, func: Any) -> Operation:
        """What is known of ``func``."""
        met = self._met.get(id(func))  # which ``met`` keeps alive, so that no other has its id
        if met is None:
            met = self._met[id(func)] = Operation(func)
        return met


def effect(func: Any) -> Effect:
    """What ``func``, an overload of an operation, does."""
    schema = func._schema
    if any(str(result.type) not in ("Tensor", "List[Tensor]") for result in schema.returns):
        return Effect.ELSE
    aliases = [result.alias_info for result in schema.returns]
    if not schema.is_mutable and aliases and all(alias is not None for alias in aliases):
        return Effect.VIEWS
    if any(str(result.type) != "Tensor" for result in schema.returns):
        return Effect.ELSE
    if not schema.is_mutable and not any(aliases):
        return Effect.MAKES
    return Effect.ELSE if written_by(func) is None else Effect.WRITES


def written_by(func: Any) -> _Find | None:
    """Finds the operand that ``func`` writes into and returns; None where there is not just one."""
    schema = func._schema
    if len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    if not schema.returns[0].alias_info.is_write:
        return None
    sets = schema.returns[0].alias_info.before_set
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == sets:
            name, place = argument.name, position
            return lambda args, kwargs: kwargs[name] if name in kwargs else args[place]
    return None


def forgotten(value: Any) -> Any:
    """``value`` with every real tensor in it replaced by one of its shape without memory."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(forgotten(inner) for inner in value)
    if isinstance(value, dict):
        return {key: forgotten(inner) for key, inner in value.items()}
    return value


def _call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (len(args), _key((*args, *kwargs, *kwargs.values()))) if kwargs else _key(args)


def _key(values: Sequence[Any]) -> tuple[Any, ...]:
    """What of operands decides a result's shape, hashable."""
    key: list[Any] = []
    for value in values:
        kind = value.__class__
        if kind is Tensor or kind is Parameter:
            key += value.shape, value.stride(), value.dtype, value.is_meta
        elif kind is tuple or kind is list:
            key.append(_key(value))
        else:
            # 1, 1.0 and True are equal, and promote differently; a NaN does not equal itself.
            key += kind, value if value == value else None
    return tuple(key)
