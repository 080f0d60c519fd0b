"""A rank's share of the training state, one matrix or vector at a time (design 4.5, 4.7)."""

from typing import NamedTuple

from torch import Tensor


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
