"""Which elements of which saved part fill which piece: interval arithmetic. Pure.

A tensor is a row of elements [0, total). The ranks that saved it cut it one way, the ranks
that load it another; every index here counts elements of the flattened tensor.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, stored under `key` in `file`."""

    start: int
    stop: int
    file: str
    key: str


class Read(NamedTuple):
    """Elements [start, stop) of a part, counted from the part's first, go to `offset`."""

    part: Part
    start: int
    stop: int
    offset: int  # in the piece that is filled


def cover_defect(parts: Sequence[Part], total: int) -> str | None:
    """What keeps `parts` from covering [0, total) exactly once, in words; None: nothing does."""
    reached, last = 0, "the beginning"
    for part in sorted(parts):
        if part.start > reached:
            return f"[{reached}:{part.start}] of {total} elements missing after {last}"
        if part.start < reached:
            overlap = f"[{part.start}:{min(part.stop, reached)}]"
            return f"{overlap} of {total} elements both in {last} and in {part.file}"
        reached, last = part.stop, part.file
    if reached < total:
        return f"[{reached}:{total}] of {total} elements missing after {last}"
    if reached > total:
        return f"{reached} elements up to the end of {last}, its shape has {total}"
    return None


def reads(parts: Sequence[Part], start: int, stop: int) -> Iterator[Read]:
    """How the piece [start, stop) is filled from parts that cover it."""
    for part in parts:
        first, last = max(start, part.start), min(stop, part.stop)
        if first < last:
            yield Read(part, first - part.start, last - part.start, first - start)


def covering_rows(shape: Sequence[int], start: int, stop: int) -> tuple[int, int, int]:
    """The rows [first, last) of a tensor that hold elements [start, stop), start < stop.

    Returns:
        (first, last, skip): `skip` elements of row `first` come before element `start`. A
        row is what one index of the first dimension selects.
    """
    width = math.prod(shape[1:])
    first = start // width
    return first, -(-stop // width), start - first * width
