"""A rank's share of the training state, one matrix or vector at a time (design 4.5, 4.7)."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kimi_pretrain.model.names import hf_tensors
from kimi_pretrain.optim.buckets import Bucket


class Piece(NamedTuple):
    """Elements [start, start + values.numel()) of one named tensor, held by this rank.

    Over the ranks of a run the pieces of a (kind, name) cover the tensor once: nothing is
    held twice, nothing is missing. ``values`` is a view of the live state; writing into it
    is how a checkpoint loads.
    """

    kind: str  # master | momentum | exp_avg | exp_avg_sq
    name: str  # Hugging Face's, one matrix or vector: experts unstacked
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # of this piece in the flattened tensor, elements
    values: Tensor  # [elements] fp32 (fp64 for fp64), contiguous


class NamedRange(NamedTuple):
    """Where in a bucket one named matrix or vector lies."""

    name: str  # Hugging Face's
    shape: tuple[int, ...]
    start: int  # elements from the bucket's start
    stop: int


def named_ranges(bucket: Bucket, first_expert: int) -> Iterator[NamedRange]:
    """The named tensors of a bucket, experts unstacked, in the order in which they lie.

    ``first_expert`` is the index of the first routed expert that the rank holds.
    """
    for slot in bucket.slots:
        start = slot.offset
        for name, shape in hf_tensors(slot.spec.name, slot.spec.shape, first_expert):
            stop = start + math.prod(shape)
            yield NamedRange(name, shape, start, stop)
            start = stop
