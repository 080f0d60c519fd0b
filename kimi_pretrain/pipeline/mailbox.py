"""Activations and gradients between pipeline stages, on this rank or another.

A receive is posted where the schedule says and awaited by whoever needs the tensor; a send
holds its tensor until it is done. Neighbouring stages on one rank hand over directly. Shapes
are known from the configuration, so no header travels.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_pretrain.parallel.collectives import Group, Handle

Key = tuple[str, int, int]  # "activation" or "gradient", stage that takes it, microbatch


class Mailbox:
    """What has arrived for this rank's stages, and what is still leaving."""

    def __init__(
        self, group: Group, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, most: int
    ) -> None:
        """A mailbox.

        Args:
            group: the ranks of this pipeline.
            shapes: of the tensor between stages of each microbatch, [batch, length, hidden].
            dtype: likewise.
            most: messages that may be leaving at once; one more waits for the oldest. Whoever
                receives posts what a verified schedule sends even if every send waited.
        """
        self.group, self.shapes, self.dtype, self.most = group, shapes, dtype, most
        self._here: dict[Key, tuple[Tensor, Handle]] = {}
        self._leaving: deque[tuple[Handle, Tensor]] = deque()

    def put(self, key: Key, tensor: Tensor) -> None:
        """Something for a stage of this rank, made here; or something that is to leave."""
        self._here[key] = tensor, Handle()

    def post(self, key: Key, source: int) -> Handle:
        """Start to receive what member ``source`` of the group sends for ``key``."""
        buffer = torch.empty(self.shapes[key[2]], dtype=self.dtype, device=self.group.device)
        handle = self.group.receive(buffer, source)
        self._here[key] = buffer, handle
        return handle

    def send(self, key: Key, to: int) -> Handle:
        """Start to send what was put for ``key`` to member ``to``.

        Raises:
            PeerError: an older message did not leave before the deadline.
        """
        tensor = self.take(key).contiguous()
        handle = self.group.send(tensor, to)
        self._leaving.append((handle, tensor))
        # A gloo send is not done before it is awaited, however long ago it left.
        while self._leaving and (len(self._leaving) > self.most or self._leaving[0][0].done):
            self._leaving[0][0].wait()
            self._leaving.popleft()
        return handle

    def take(self, key: Key) -> Tensor:
        """What is here for ``key``, once it has arrived.

        Raises:
            PeerError: it did not before the deadline.
        """
        tensor, handle = self._here.pop(key)
        handle.wait()
        return tensor

    def close(self) -> None:
        """Return when everything has left.

        Raises:
            PeerError: it did not before the deadline.
            RuntimeError: something was never taken.
        """
        for handle, _ in self._leaving:
            handle.wait()
        self._leaving.clear()
        if self._here:
            raise RuntimeError(f"nobody took {sorted(self._here)}")
