"""Bytes of the tensors that are alive, by what made them; also of tensors without memory."""

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor, UntypedStorage


class LiveBytes:
    """Every storage that was shown to it, until torch frees it.

    A storage belongs to no one when it is shown; ``label`` gives all of those to whoever made
    them, once they are known.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self.of: Counter[str] = Counter()  # label -> bytes
        self.before_next: Callable[[], None] | None = None  # called before the next operation
        self._live: dict[int, tuple[int, str, weakref.ref[UntypedStorage]]] = {}
        self._new: dict[int, None] = {}  # in order

    def show(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor``, if it is a new one."""
        storage = tensor.untyped_storage()
        address = storage._cdata  # of the storage itself: its data has none
        if address in self._live:
            return
        size = storage.nbytes()
        gone = weakref.ref(storage, partial(self._freed, address))
        self._live[address] = size, "", gone
        self._new[address] = None
        self.of[""] += size
        self.now += size
        if self.now > self.peak:
            self.peak = self.now

    def label(self, label: str) -> None:
        """What is new since the last call, and still alive, is ``label``'s."""
        for address in self._new:
            size, _, gone = self._live[address]
            self._live[address] = size, label, gone
            self.of[""] -= size
            self.of[label] += size
        self._new.clear()

    def give(self, tensor: Tensor, label: str) -> None:
        """The storage of ``tensor`` is ``label``'s from now on, whoever's it was."""
        address = tensor.untyped_storage()._cdata
        size, before, gone = self._live[address]
        if not before:
            del self._new[address]
        self._live[address] = size, label, gone
        self.of[before] -= size
        self.of[label] += size

    def _freed(self, address: int, gone: object) -> None:
        del gone
        size, label, _ = self._live.pop(address)
        if not label:
            del self._new[address]
        self.of[label] -= size
        self.now -= size
