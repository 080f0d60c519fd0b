"""Interval arithmetic: any cut fills any piece; every hole and overlap is seen."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kimi_pretrain.checkpoint.reshard import Part, cover_defect, covering_rows, reads


@st.composite
def covers(draw: st.DrawFn) -> tuple[int, list[Part]]:
    """A total, and parts in any order that cover it once."""
    total = draw(st.integers(1, 60))
    inner = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=8)) - {total}
    edges = [0, *sorted(inner), total]
    parts = [Part(a, b, f"f{a}", "k") for a, b in pairwise(edges)]
    return total, draw(st.permutations(parts))


@given(covers(), st.data())
def test_any_piece_is_filled_once_from_any_cut(
    cover: tuple[int, list[Part]], data: st.DataObject
) -> None:
    """Catches an offset counted from the tensor instead of the part, or a border read twice."""
    total, parts = cover
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert cover_defect(parts, total) is None
    filled = [-1] * (stop - start)
    for read in reads(parts, start, stop):
        for element in range(read.start, read.stop):
            at = read.offset + element - read.start
            assert filled[at] == -1
            filled[at] = read.part.start + element
    assert filled == list(range(start, stop))


@given(covers(), st.data())
def test_a_hole_an_overlap_and_a_wrong_end_are_defects(
    cover: tuple[int, list[Part]], data: st.DataObject
) -> None:
    """Catches a check of the summed length, which a hole and an overlap pass together."""
    total, parts = cover
    index = data.draw(st.integers(0, len(parts) - 1))
    victim, others = parts[index], parts[:index] + parts[index + 1 :]
    assert cover_defect(others, total) is not None
    assert cover_defect([*parts, victim], total) is not None
    assert cover_defect(parts, total + 1) is not None
    assert cover_defect(parts, total - 1) is not None
    if len(others) > 0 and victim.start > 0:
        shifted = Part(victim.start - 1, victim.stop - 1, victim.file, victim.key)
        assert cover_defect([*others, shifted], total) is not None


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_rows_cover_a_range_and_no_row_is_read_in_vain(
    shape: list[int], data: st.DataObject
) -> None:
    """Catches a whole matrix read for one row, and a range that ends inside a row cut short."""
    total, width = math.prod(shape), math.prod(shape[1:])
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    first, last, skip = covering_rows(shape, start, stop)
    assert first * width + skip == start
    assert 0 <= skip < width
    assert stop <= last * width < stop + width
    assert last <= shape[0]


def test_a_defect_names_files_and_numbers() -> None:
    """Catches a message that only says that something is wrong."""
    parts = [Part(0, 4, "one", "k"), Part(6, 8, "two", "k")]
    assert cover_defect(parts, 8) == "[4:6] of 8 elements missing after one"
    parts = [Part(0, 4, "one", "k"), Part(3, 8, "two", "k")]
    assert cover_defect(parts, 8) == "[3:4] of 8 elements both in one and in two"
