"""Flat buffers of parameters and gradients, and who holds which part of them (design 4.5).

A bucket is one buffer that a replica group reduces and gathers at once; ZeRO-1 cuts it into
even shards, one a rank of the group. Elements are counted from the bucket's start. Plain
data, the same on every rank; no torch import.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple


@dataclass(frozen=True)
class Spec:
    """A parameter as one rank of a pipeline stage holds it.

    ``shape`` ends in a matrix [rows, cols] where Muon updates it; the dimensions before are
    a stack. Experts are replicated over edp, all else over dp = edp x ep.
    """

    name: str  # the model's, as in model.layers.3.mlp.experts.gate_up_proj
    shape: tuple[int, ...]
    muon: bool  # else AdamW
    expert: bool

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """[rows, cols] of one matrix of the stack."""
        rows, cols = self.shape[-2:]
        return rows, cols


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket: one contiguous run, so it is a view of it."""

    spec: Spec
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + self.spec.elements


@dataclass(frozen=True)
class Matrix:
    """One matrix of a bucket, which Newton-Schulz takes by itself."""

    slot: int
    index: int  # within the slot's stack, its leading dimensions flattened
    offset: int
    rows: int
    cols: int

    @property
    def stop(self) -> int:
        return self.offset + self.rows * self.cols


class Part(NamedTuple):
    """What of a range of elements lies in one rank's shard: [start, stop)."""

    rank: int  # of the bucket's group
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """One flat buffer of a replica group.

    =======  ======================================================================
    kind     what a shard holds
    =======  ======================================================================
    aligned  whole Muon matrices, all of one shape, equally many on every rank
    flat     an even share of Muon matrices of any shapes, cut wherever it falls
    adamw    an even share of what AdamW updates
    =======  ======================================================================

    Raises:
        ValueError: slots that do not follow each other, or a size that does not divide.
    """

    group: str  # edp | dp
    ranks: int  # of that group
    kind: str
    slots: tuple[Slot, ...]
    size: int  # elements, the padding at the end included; a multiple of ranks
    # For each matrix the dp rank that orthogonalises it. Group edp exists once for each ep index
    # and has a row for each; dp has one row; of adamw there is none.
    owners: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        stop = 0
        for slot in self.slots:
            if slot.offset != stop:
                raise ValueError(f"{slot.spec.name} begins at {slot.offset}, not at {stop}")
            stop = slot.stop
        if self.size < stop or self.size % self.ranks:
            raise ValueError(f"{self.size} elements for {stop} over {self.ranks} ranks")

    @property
    def shard(self) -> int:
        """Elements of one rank: rank r holds [r * shard, (r + 1) * shard)."""
        return self.size // self.ranks

    @property
    def elements(self) -> int:
        """Without padding."""
        return self.slots[-1].stop if self.slots else 0

    @property
    def padding(self) -> int:
        """Elements at the end that belong to no parameter."""
        return self.size - self.elements

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The Muon matrices in order of their offsets; none where AdamW updates."""
        return () if self.kind == "adamw" else tuple(self._matrices())

    def _matrices(self) -> Iterator[Matrix]:
        for number, slot in enumerate(self.slots):
            rows, cols = slot.spec.matrix
            for index in range(slot.spec.elements // (rows * cols)):
                yield Matrix(number, index, slot.offset + index * rows * cols, rows, cols)

    def parts(self, start: int, stop: int) -> tuple[Part, ...]:
        """The elements [start, stop), not empty, by the shards they lie in, in order of rank."""
        shard = self.shard
        return tuple(
            Part(rank, max(start, rank * shard), min(stop, (rank + 1) * shard))
            for rank in range(start // shard, (stop - 1) // shard + 1)
        )

    def dp_rank(self, rank: int, ep_index: int, ep: int) -> int:
        """The dp rank of the group's ``rank``; of group edp, in the one of this ep index."""
        return rank * ep + ep_index if self.group == "edp" else rank


@dataclass(frozen=True)
class Layout:
    """The buckets of one pipeline stage, in the order in which backward finishes them."""

    edp: int
    ep: int
    buckets: tuple[Bucket, ...]

    @property
    def dp(self) -> int:
        """Replicas of what is no expert; dp rank = edp index x ep + ep index."""
        return self.edp * self.ep
