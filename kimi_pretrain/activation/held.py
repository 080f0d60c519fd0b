"""What a backward that is driven by hand needs beside autograd's graphs, kept by its tag."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from kimi_pretrain.activation.handles import Ref
from kimi_pretrain.activation.saved import Saved

T = TypeVar("T")


class Held(Generic[T]):
    """A dataclass between forward and backward, its tensors where the policy of a tag says.

    Those in tuples too: what a library gave to be given back. All else stays as it is.
    """

    def __init__(self, value: T, tag: str, saved: Saved) -> None:
        """Keep ``value``, an instance of a dataclass, as a ``tag`` of a running forward."""

        def keep(part: Any) -> Any:
            return saved.hold(tag, part) if isinstance(part, Tensor) else part

        self._type = type(value)
        self._parts = {
            field.name: _each(getattr(value, field.name), keep)
            for field in fields(value)  # type: ignore[arg-type]
        }

    def load(self) -> T:
        """The value, as it was.

        Raises:
            OffloadError: a tensor of it is on the host, and was not fetched.
        """
        return self._type(**{name: _each(part, _load) for name, part in self._parts.items()})


def _each(part: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(part, tuple) and not isinstance(part, Ref):
        return tuple(_each(inner, change) for inner in part)
    return change(part)


def _load(part: Any) -> Any:
    return part.load() if isinstance(part, Ref) else part
