"""How a layer tells what its backward needs, without knowing how that is kept.

An operation saves tensors; whoever runs the forward decides how they lie in memory until then
(``activation``). Between the two stands a ``Saver``: ``named`` says what kind of tensor one is,
``remade`` that it can be computed again, ``tiled`` that its FP8 tiles would do. Without a saver
they do nothing, and autograd keeps every tensor as it always does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor

R = TypeVar("R", bound=Tensor | tuple[Tensor, ...])


class Saver(Protocol):
    """Decides how the tensors of a running forward are kept."""

    def named(self, tag: str, tensor: Tensor) -> None:
        """``tensor``'s storage is a ``tag`` (config/activation.py)."""
        ...

    def remade(
        self,
        tag: str,
        make: Callable[..., Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """``outputs`` are ``tag``s, and ``make(*inputs)`` without gradients gives them again."""
        ...

    def tiled(self, tag: str, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        """As ``named``, for who can read FP8 tiles: these, if they are what is to be saved."""
        ...

    def keeps(self, tag: str) -> bool:
        """Whether a tensor that backward can do without is worth saving."""
        ...


_saver: Saver | None = None


@contextmanager
def saving(saver: Saver | None) -> Iterator[None]:
    """Tensors are saved as ``saver`` decides while this lasts."""
    global _saver
    before, _saver = _saver, saver
    try:
        yield
    finally:
        _saver = before


def named(tag: str, *tensors: Tensor | None) -> None:
    """Say of which kind tensors are that a backward will need."""
    if _saver is not None:
        for tensor in tensors:
            if tensor is not None:
                _saver.named(tag, tensor)


def tiled(tag: str, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Name a tensor that a backward will need, whole or as the FP8 tiles of its rows.

    Args:
        tag: of the tensor.
        tensor: [..., width].

    Returns:
        Codes [..., width] and scales [..., tiles] (``ops.fp8_tiles``), where a ``tag`` is kept as
        such: save and read these, and the tensor can go. None: save the tensor.
    """
    return None if _saver is None else _saver.tiled(tag, tensor)


def remade(tag: str, make: Callable[..., R], *inputs: Tensor) -> R:
    """``make(*inputs)``, whose results a backward will need and could have made again.

    Args:
        tag: of the results.
        make: of tensors only, and the same whenever it runs within a step: no random numbers,
            no observers.
        inputs: each named, or remade itself.
    """
    return remade_by(tag, make(*inputs), make, *inputs)


def remade_by(tag: str, result: R, make: Callable[..., R], *inputs: Tensor) -> R:
    """``result``, as ``remade`` gives it: what was computed otherwise than it is made again."""
    if _saver is not None:
        outputs = (result,) if isinstance(result, Tensor) else result
        _saver.remade(tag, make, inputs, outputs)
    return result


def keeps(tag: str) -> bool:
    """Whether a ``tag`` is saved where backward could do without it."""
    return _saver is None or _saver.keeps(tag)
