"""How one tensor is kept between forward and backward (design 4.4).

A handle stands for a whole storage: several saved tensors may be views of one, and a ``Ref``
is such a view. ``parts`` are the device tensors that a handle holds meanwhile; what ``load``
made of them it keeps as long as it lives, which is until the last operation that saved a view
has had its backward. So a chain is computed again once, whoever asks first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kimi_pretrain.ops.saved import saving


class Handle(Protocol):
    """One storage, kept in some way."""

    tag: str

    @property
    def parts(self) -> list[Tensor]:
        """The device tensors that it holds until it is loaded, and that may leave."""
        ...

    @property
    def loaded(self) -> Tensor | None:
        """What ``load`` made and keeps beside them."""
        ...

    def load(self) -> Tensor:
        """The storage as one flat tensor [elements], bit for bit what was saved (FP8: close)."""
        ...


class Ref(NamedTuple):
    """A view of a handle's storage, as an operation saved it."""

    handle: Handle
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, handle: Handle) -> "Ref":
        """``tensor``, whose storage is the handle's."""
        return cls(handle, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def load(self) -> Tensor:
        """The tensor, with the strides that it had."""
        return self.handle.load().as_strided(self.size, self.stride, self.offset)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, flat: [elements]."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((elements,), (1,), 0)


class Keep:
    """As it is."""

    def __init__(self, tag: str, tensor: Tensor) -> None:
        self.tag = tag
        self.parts = [whole(tensor)]
        self.loaded = None  # it is the part itself

    def load(self) -> Tensor:
        return self.parts[0]


class Fp8Tile:
    """E4M3 in tiles of 1 x 128 with an fp32 scale each; nothing is computed in FP8."""

    def __init__(
        self,
        tag: str,
        rows: Tensor,
        quantise: Callable[[Tensor], tuple[Tensor, Tensor]],
        dequantise: Callable[[Tensor, Tensor, torch.dtype], Tensor],
    ) -> None:
        """Quantise ``rows`` [..., width], bf16 or fp32, contiguous and alone in its storage.

        Raises:
            ValueError: it is a view of something larger: tiles would not be its rows.
        """
        if not rows.is_contiguous() or whole(rows).numel() != rows.numel():
            raise ValueError(f"{tag}: FP8 tiles are cut from a contiguous tensor, not from a view")
        self.tag = tag
        self.parts = [*quantise(rows.detach())]
        self._dequantise, self._dtype = dequantise, rows.dtype
        self.loaded: Tensor | None = None

    def load(self) -> Tensor:
        if self.loaded is None:
            codes, scale = self.parts
            self.loaded = self._dequantise(codes, scale, self._dtype).view(-1)
            self.parts = []
        return self.loaded


class Chain:
    """Operations to run again, once, for all of their results."""

    def __init__(self, make: Callable[..., Any], inputs: Sequence[Ref]) -> None:
        self._make: Callable[..., Any] | None = make
        self._inputs = inputs
        self.made: list[Tensor] = []

    def results(self) -> list[Tensor]:
        """The storages of all results, flat; the inputs are let go."""
        if self._make is not None:
            with torch.no_grad(), saving(None):
                made = self._make(*[ref.load() for ref in self._inputs])
            self.made = [whole(x) for x in ((made,) if isinstance(made, Tensor) else made)]
            self._make, self._inputs = None, ()
        return self.made


class Recompute:
    """Not kept: one result of a chain that runs again when backward first needs any."""

    parts: list[Tensor] = []  # noqa: RUF012 - never filled

    def __init__(self, tag: str, chain: Chain, index: int) -> None:
        self.tag = tag
        self._chain, self._index = chain, index

    @property
    def loaded(self) -> Tensor | None:
        return self._chain.made[self._index] if self._chain.made else None

    def load(self) -> Tensor:
        return self._chain.results()[self._index]
