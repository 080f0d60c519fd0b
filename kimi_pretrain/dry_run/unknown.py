"""Tensors without memory: what a program computes with them, and what it reads of them.

They are torch's tensors of device meta. Operations on them check and give shapes and dtypes and
nothing else, so nobody knows a value; but a program reads a few: how many labels there are,
whether a norm is finite, which heads to clip. Here it finds ones.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_pretrain.dry_run.memory import LiveBytes
from kimi_pretrain.dry_run.shapes import Effect, Operation, Operations, forgotten

_aten = torch.ops.aten
_VIEWS, _MAKES, _ELSE = Effect.VIEWS, Effect.MAKES, Effect.ELSE  # found a million times


class Unknown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which tensors without memory and real ones go together.

    =====================================  ====================================
    an operation                           gives
    =====================================  ====================================
    on unknown and real operands           something unknown
    that writes something unknown into     ones there
    a real tensor
    that reads a value or copies it to     ones; True
    the host
    that asks where something is not zero  every position
    =====================================  ====================================
    """

    def __init__(self, memory: LiveBytes) -> None:
        """``memory`` is shown what operations make."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self.operations = 0
        self._operations = Operations()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to say so makes torch import its compiler, for seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        self.operations += 1
        if self.memory.before_next is not None:
            look, self.memory.before_next = self.memory.before_next, None
            look()
        operation = self._operations.of(func)
        does = operation.does
        if does is _VIEWS:
            return func(*args, **kwargs)
        if does is not _ELSE:
            result = operation.repeat(args, kwargs)
            if result is not NotImplemented:
                if does is _MAKES:
                    self._show(result)
                return result
        unknown = real = False
        for tensor in _tensors(args, kwargs):
            if tensor.is_meta:
                unknown = True
            else:
                real = True
        if not unknown:
            result = func(*args, **kwargs)
        else:
            result = self._of_unknown(operation, args, kwargs, real)
        if does is not Effect.WRITES:
            self._show(result)
        return result

    def _show(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self.memory.show(result)
        else:
            for tensor in _tensors((result,), {}):
                self.memory.show(tensor)

    def _of_unknown(self, operation: Operation, args: Any, kwargs: Any, real: bool) -> Any:
        func = operation.func
        if func in _READS and (read := _READS[func](args, kwargs)) is not NotImplemented:
            return read
        if real and func._schema.is_mutable and not args[0].is_meta:
            return args[0].fill_(1)
        if operation.does is Effect.ELSE:
            return func(*forgotten(args), **forgotten(kwargs))
        return operation.call(args, kwargs)


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Of operands, those in lists too."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [inner for inner in value if isinstance(inner, Tensor)]
    return found


def _number(args: Any, kwargs: Any) -> bool | int | float:
    del kwargs
    dtype = args[0].dtype
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _copy_away(args: Any, kwargs: Any) -> Any:
    """``to`` the host; any other ``to`` reads nothing."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "meta":
        return NotImplemented
    return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)


def _everywhere(args: Any, kwargs: Any) -> Tensor:
    del kwargs
    return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64, device="meta")


_READS: dict[Any, Callable[[Any, Any], Any]] = {
    _aten._local_scalar_dense.default: _number,
    _aten._to_copy.default: _copy_away,
    _aten.nonzero.default: _everywhere,
}
