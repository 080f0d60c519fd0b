"""What operations on tensors without memory give, each found once.

torch finds the shape of a result in Python, which for many operations takes ten times as long as
to look up what operands of the same shapes gave before; and every microbatch repeats the last.
"""

from collections.abc import Callable
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Effect(Enum):
    """What an operation does, as its schema tells."""

    VIEWS = auto()  # its results share an operand's memory
    WRITES = auto()  # it returns the one operand that it writes into
    MAKES = auto()  # it makes new tensors and changes nothing
    ELSE = auto()


_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides, dtype
_Find = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Shapes:
    """Operations that write or make, on tensors of device meta: called once, then repeated."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[_Spec, ...]] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, to be repeated; all tensors among its operands are unknown."""
        key = _call_key(func, args, kwargs)
        result = func(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        if key == _call_key(func, args, kwargs):  # no operand was resized
            self._known[key] = tuple((x.shape, x.stride(), x.dtype) for x in results)
        return result

    def repeat(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``call`` gave for operands of the same shapes; NotImplemented where it gave none."""
        known = self._known.get(_call_key(func, args, kwargs))
        if known is None:
            return NotImplemented
        if (written := written_by(func)) is not None:
            return written(args, kwargs)
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in known
        ]
        return made[0] if len(made) == 1 else tuple(made)


@cache
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


@cache
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


def _call_key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func, _key(args), _key(tuple(kwargs.items())) if kwargs else ()


def _key(value: Any) -> Any:
    """What decides a result's shape, hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (tuple, list)):
        return tuple([_key(inner) for inner in value])
    return value.__class__, value  # 1, 1.0 and True are equal, and promote differently
