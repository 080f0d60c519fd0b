"""What one chunk keeps of one microbatch: every tensor that an operation saves, by its tag."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kimi_pretrain.activation.handles import Chain, Fp8Tile, Handle, Keep, Recompute, Ref
from kimi_pretrain.activation.offload import Offload, Offloader
from kimi_pretrain.config.activation import TAGS, Policy
from kimi_pretrain.ops.fp8_tiles import dequantise_tiles, marked_tiles, quantise_tiles
from kimi_pretrain.ops.saved import saving

_KEEP = Policy()
CONSTANT = "constant"  # what all layers share; neither counted nor moved


class UntaggedError(RuntimeError):
    """An operation saved a tensor that nobody named."""


@dataclass(frozen=True)
class Activations:
    """How a run keeps its activations."""

    policies: Mapping[str, Policy]
    offloader: Offloader | None = None  # where a policy offloads
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]] = quantise_tiles
    dequantise: Callable[[Tensor, Tensor, torch.dtype], Tensor] = dequantise_tiles
    live: "weakref.WeakSet[Saved]" = field(default_factory=weakref.WeakSet, init=False)
    # FP8 tiles with a NaN or an infinity, by tag, since this was cleared: scalars on the device
    marked: dict[str, Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def kept(cls) -> "Activations":
        """Everything is kept as it is."""
        return cls(dict.fromkeys(TAGS, _KEEP))

    def handle(self, tag: str, tensor: Tensor) -> Handle:
        """What keeps ``tensor``'s storage."""
        inner: Handle
        if self.policies[tag].fp8:
            inner = Fp8Tile(tag, tensor, partial(self.tiles, tag), self.dequantise)
        else:
            inner = Keep(tag, tensor)
        return self._placed(inner)

    def handles_of_tiles(self, tag: str, tensor: Tensor) -> list[tuple[Tensor, Handle]]:
        """Codes and scales of ``tensor`` [..., width], each with what keeps it as it is."""
        return [(part, self._placed(Keep(tag, part))) for part in self.tiles(tag, tensor)]

    def tiles(self, tag: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [..., width] and scales [..., tiles] of ``tensor``; marked tiles are counted.

        On the device: nobody waits for the count.
        """
        codes, scale = self.quantise(tensor.detach())
        found = marked_tiles(scale).sum()
        self.marked[tag] = self.marked[tag] + found if tag in self.marked else found
        return codes, scale

    def marked_by_tag(self) -> dict[str, int]:
        """How many tiles were marked, of the tags that had any; waits for the device."""
        counts = {tag: int(found) for tag, found in self.marked.items()}
        return {tag: count for tag, count in counts.items() if count}

    def _placed(self, handle: Handle) -> Handle:
        return Offload(handle) if self.policies[handle.tag].offload else handle


@dataclass
class _Late:
    """A tensor that an operation saved before anybody could name it: its own result."""

    tensor: Tensor | None
    ref: Ref | None = None


class Saved:
    """A ``Saver`` (ops/saved.py): the storages of one microbatch's forward through one chunk.

    Storages are told apart by identity, so that any view of a named tensor is known. Handles
    live as long as autograd's graph, or a chain that starts from them, holds them: ``close``
    lets go of all that was named and then not needed.
    """

    def __init__(self, activations: Activations) -> None:
        self._how = activations
        # A weak reference holds a storage's address, not its memory: no other gets the address.
        self._known: dict[int, tuple[StorageWeakRef, Handle]] = {}
        self._handles: list[weakref.ref[Handle]] = []
        self._late: list[_Late] = []
        activations.live.add(self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Operations that run meanwhile save through this."""
        with (
            saving(self),
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack),
        ):
            yield
            late, self._late = self._late, []
            for saved in late:
                assert saved.tensor is not None
                saved.ref, saved.tensor = self._ref(saved.tensor), None

    def constants(self, *tensors: Tensor | None) -> None:
        """Tensors that all layers share: no activations, and no copy of them is kept."""
        for tensor in tensors:
            if tensor is not None:
                self._enter(tensor, Keep(CONSTANT, tensor))

    def hold(self, tag: str, tensor: Tensor) -> Ref:
        """``tensor``, a ``tag``, for who needs it in backward and is no operation: to be loaded."""
        self.named(tag, tensor)
        return self._ref(tensor)

    def close(self) -> None:
        """The forward is over."""
        self._known.clear()

    def handles(self) -> Iterator[Handle]:
        """Those that are still needed, in the order in which they were named."""
        for reference in self._handles:
            handle = reference()
            if handle is not None:
                yield handle

    def offloadable(self) -> list[Offload]:
        """Those that may leave the device."""
        return [handle for handle in self.handles() if isinstance(handle, Offload)]

    def recompute(self) -> None:
        """Compute again now what backward would compute again when it comes to it."""
        for handle in self.handles():
            if isinstance(handle, Recompute):
                handle.load()

    def device_bytes(self) -> dict[str, int]:
        """Bytes that lie on the device, by tag: kept, or already made again for a backward."""
        total: dict[str, int] = {}
        for handle in self.handles():
            made = [] if handle.loaded is None else [handle.loaded]
            size = sum(part.nbytes for part in [*handle.parts, *made])
            if size:
                total[handle.tag] = total.get(handle.tag, 0) + size
        return total

    # --- Saver ------------------------------------------------------------------------------

    def named(self, tag: str, tensor: Tensor) -> None:
        if not self._is_known(tensor):
            self._enter(tensor, self._how.handle(tag, tensor))

    def remade(
        self,
        tag: str,
        make: Callable[..., Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        if not self._how.policies[tag].recompute:
            for output in outputs:
                self.named(tag, output)
            return
        chain = Chain(make, [self._ref(x) for x in inputs])
        for index, output in enumerate(outputs):
            if not self._is_known(output):
                self._enter(output, Recompute(tag, chain, index))

    def tiled(self, tag: str, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self._how.policies[tag].fp8:
            self.named(tag, tensor)
            return None
        (codes, first), (scale, second) = self._how.handles_of_tiles(tag, tensor)
        self._enter(codes, first)
        self._enter(scale, second)
        return codes, scale

    def keeps(self, tag: str) -> bool:
        return not self._how.policies[tag].recompute

    # --- the hooks --------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Ref | _Late:
        if self._is_known(tensor):
            return self._ref(tensor)
        self._late.append(_Late(tensor.detach()))
        return self._late[-1]

    def _ref(self, tensor: Tensor) -> Ref:
        known = self._known.get(_address(tensor))
        if known is None:
            raise UntaggedError(
                f"an operation saves {tuple(tensor.shape)} {tensor.dtype} for backward, which no "
                f"tag names: `named` or `remade` it (ops/saved.py); the tags are {', '.join(TAGS)}"
            )
        return Ref.of(tensor, known[1])

    def _is_known(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._known

    def _enter(self, tensor: Tensor, handle: Handle) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[_address(tensor)] = storage, handle
        if handle.tag != CONSTANT:
            self._handles.append(weakref.ref(handle))


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _unpack(packed: Ref | _Late) -> Tensor:
    ref = packed if isinstance(packed, Ref) else packed.ref
    assert ref is not None
    return ref.load()
