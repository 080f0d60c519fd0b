"""The world of one rank without its peers: each of them holds what this rank holds.

Groups are the program's own, so they count what a real group would send; only the operations
themselves are not given to torch.distributed. What a peer would send is known all the same, since
it is what this rank would send in its place.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.collectives import Group, Handle
from kimi_pretrain.parallel.topology import KINDS, Topology
from kimi_pretrain.parallel.world import World

META = torch.device("meta")


class MirroredGroup(Group):
    """A group whose other members are this rank again.

    Shapes are checked as no backend checks them: an uneven split that does not add up would be
    a hang, or rows lost, on a real one.
    """

    def __init__(
        self,
        kind: str,
        ranks: Sequence[int],
        rank: int,
        received: Callable[[Tensor], None],
        ranks_per_node: int,
    ) -> None:
        """The group of ``ranks``; ``received`` is told of every message's memory."""
        super().__init__(kind, ranks, ranks.index(rank), "mirrored", device=META)
        self._received = received
        self._away = [other // ranks_per_node != rank // ranks_per_node for other in ranks]
        self.between_nodes: Counter[str] = Counter()  # operation -> bytes of those sent
        self._flying = 0
        self.most_flying = 0  # bytes of all-to-alls that had not been waited for, in and out

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        name: str = "all_to_all",
    ) -> Handle:
        self._require_split(name, output, output_splits)
        self._require_split(name, input, input_splits)
        if output.shape[1:] != input.shape[1:] or output.dtype != input.dtype:
            raise ValueError(f"{name}: {_described(input)} cannot arrive in {_described(output)}")
        handle = super().all_to_all(output, input, output_splits, input_splits, name)
        if self.size > 1:
            rows = input_splits or [input.shape[0] // self.size] * self.size
            leaving = sum(n for n, away in zip(rows, self._away, strict=True) if away)
            self.between_nodes[name] += leaving * input[:1].nbytes
            handle = self._in_flight(input.nbytes + output.nbytes)
        if self.size > 1 and not output.is_meta:
            # Everyone sends this rank what it sends to itself.
            own = input.chunk(self.size)[self.index]
            output.copy_(own.repeat(self.size, *[1] * (own.ndim - 1)))
        return handle

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Handle:
        _require_sizes("reduce_scatter", input, output, self.size)
        return super().reduce_scatter(output, input)

    def all_gather(self, output: Tensor, input: Tensor) -> Handle:
        _require_sizes("all_gather", output, input, self.size)
        return super().all_gather(output, input)

    def send(self, tensor: Tensor, to: int) -> Handle:
        self.between_nodes["send"] += tensor.nbytes * self._away[to]
        return super().send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Handle:
        self._received(tensor)
        return super().receive(tensor, source)

    def _in_flight(self, size: int) -> Handle:
        self._flying += size
        self.most_flying = max(self.most_flying, self._flying)
        return Handle(finish=partial(self._landed, size))

    def _landed(self, size: int) -> None:
        self._flying -= size

    def _start(
        self, name: str, call: Callable[[], Any], finish: Callable[[], None] | None = None
    ) -> Handle:
        del name, call
        return Handle(finish=finish)

    def _require_split(self, name: str, tensor: Tensor, splits: Sequence[int] | None) -> None:
        rows = tensor.shape[0]
        fits = rows % self.size == 0 if splits is None else len(splits) == self.size
        if not fits or (splits is not None and sum(splits) != rows):
            raise ValueError(f"{name}: {splits or self.size} do not split {rows} rows")


class MirroredWorld(World):
    """A world whose groups are mirrored."""

    def mirrored(self) -> list[MirroredGroup]:
        """All of them."""
        groups = (self.ep, self.pp, self.edp, self.dp, self.everyone)
        return [group for group in groups if isinstance(group, MirroredGroup)]


def mirrored_world(
    parallel: ParallelConfig, rank: int, received: Callable[[Tensor], None], ranks_per_node: int
) -> MirroredWorld:
    """The world of ``parallel`` as ``rank`` sees it, on device meta."""
    topology = Topology.of_config(parallel)

    def group(kind: str, ranks: Sequence[int]) -> MirroredGroup:
        return MirroredGroup(kind, ranks, rank, received, ranks_per_node)

    groups = {kind: group(kind, topology.group(kind, rank)) for kind in KINDS}
    everyone = group("world", range(topology.world))
    return MirroredWorld(
        topology,
        rank,
        META,
        ep=groups["ep"],
        pp=groups["pp"],
        edp=groups["edp"],
        dp=groups["dp"],
        everyone=everyone,
    )


def _require_sizes(name: str, whole: Tensor, part: Tensor, size: int) -> None:
    if whole.numel() != size * part.numel() or whole.dtype != part.dtype:
        raise ValueError(f"{name}: {_described(whole)} is not {size} times {_described(part)}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
