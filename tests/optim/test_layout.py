"""The layout: every element once, whole matrices where they are promised, no needless padding."""

from math import prod

import pytest
from hypothesis import given, settings

from kimi_pretrain.optim.layout import Bucket, Layout, Slot, Spec, plan_layout
from tests.optim.stage_cases import K2_EDP, k2_layout, layouts, stages


def dense(layout: Layout) -> list[Bucket]:
    return [b for b in layout.buckets if b.group == "dp" and b.kind != "adamw"]


def experts(layout: Layout) -> list[Bucket]:
    return [b for b in layout.buckets if b.group == "edp"]


def matrix(number: int, rows: int = 2, cols: int = 3, expert: int = 0) -> Spec:
    shape = (expert, rows, cols) if expert else (rows, cols)
    return Spec(f"{number}", shape, muon=True, expert=bool(expert))


# --- any stage, up to 4,096 ranks ---------------------------------------------------------


@given(stages())
@settings(deadline=None)
def test_every_parameter_has_one_place(case: dict) -> None:
    """Catches a parameter left out, laid out twice, overlapping, or reduced by a wrong group."""
    layout = plan_layout(**case)
    seen = {}
    for bucket in layout.buckets:
        assert bucket.ranks == (layout.edp if bucket.group == "edp" else layout.dp)
        assert bucket.size == bucket.shard * bucket.ranks
        stop = 0
        for slot in bucket.slots:
            assert slot.offset == stop
            stop = slot.stop
            assert slot.spec.expert == (bucket.group == "edp")
            assert slot.spec.muon == (bucket.kind != "adamw")
            seen[slot.spec.name] = slot.spec
        assert stop == bucket.elements == bucket.size - bucket.padding
    assert sum(len(bucket.slots) for bucket in layout.buckets) == len(case["specs"])
    assert sorted(seen.values(), key=str) == sorted(case["specs"], key=str)


@given(layouts())
@settings(deadline=None)
def test_padding_is_less_than_what_a_rank_needs_to_be_whole(layout: Layout) -> None:
    """Catches a shard rounded up twice: padding of a whole unit a rank."""
    for bucket in layout.buckets:
        unit = prod(bucket.slots[0].spec.matrix) if bucket.kind == "aligned" else 1
        assert bucket.shard % unit == 0
        assert bucket.padding < bucket.ranks * unit


@given(layouts())
@settings(deadline=None)
def test_aligned_shards_hold_whole_matrices_of_one_shape(layout: Layout) -> None:
    """Catches Newton-Schulz on half a matrix, and stacks that cannot be batched."""
    for bucket in layout.buckets:
        if bucket.kind == "aligned":
            assert len({(m.rows, m.cols) for m in bucket.matrices}) == 1
            assert all(len(bucket.parts(m.offset, m.stop)) == 1 for m in bucket.matrices)


@given(layouts())
@settings(deadline=None)
def test_matrices_and_shards_tile_a_bucket(layout: Layout) -> None:
    """Catches an off-by-one at the boundary of two shards or of two matrices of a stack."""
    for bucket in layout.buckets:
        if bucket.kind != "adamw":
            bounds = [(m.offset, m.stop) for m in bucket.matrices]
            assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
            assert bounds[-1][1] == bucket.elements
            for m in bucket.matrices:
                slot = bucket.slots[m.slot]
                assert (m.rows, m.cols) == slot.spec.matrix
                assert m.offset == slot.offset + m.index * m.rows * m.cols
        for slot in bucket.slots:
            parts = bucket.parts(slot.offset, slot.stop)
            assert [part.start for part in parts] == [slot.offset, *(p.stop for p in parts[:-1])]
            assert parts[-1].stop == slot.stop
            for part in parts:
                assert part.rank * bucket.shard <= part.start < part.stop
                assert part.stop <= (part.rank + 1) * bucket.shard


@given(stages())
@settings(deadline=None)
def test_buckets_come_as_backward_finishes_them(case: dict) -> None:
    """Catches a reduction that waits for one whose gradients come later."""
    layout = plan_layout(**case)
    use = {spec.name: place for place, spec in enumerate(case["specs"])}
    first_used = [min(use[s.spec.name] for s in bucket.slots) for bucket in layout.buckets]
    assert first_used == sorted(first_used, reverse=True)
    for bucket in layout.buckets:
        uses = [use[slot.spec.name] for slot in bucket.slots]
        assert uses == sorted(uses, reverse=True)


@given(stages())
@settings(deadline=None)
def test_two_ranks_plan_the_same(case: dict) -> None:
    """Catches an order that depends on a set, a hash or an identity."""
    assert plan_layout(**case) == plan_layout(**case)


# --- the rules by example -----------------------------------------------------------------


def test_expert_parameters_are_merged_until_the_ranks_divide_them() -> None:
    """Catches a bucket closed at its size with a remainder, which is padding every step."""
    specs = [matrix(i, expert=6) for i in range(5)]
    (first, second, rest) = plan_layout(specs, edp=4, ep=1, bucket_elements=36).buckets
    assert [slot.spec.name for slot in first.slots] == ["4", "3"]  # 12 matrices on 4 ranks
    assert [slot.spec.name for slot in second.slots] == ["2", "1"]
    assert (len(rest.matrices), rest.size // 6, rest.padding) == (6, 8, 12)
    assert first.padding == second.padding == 0


def test_the_size_of_a_bucket_is_reached() -> None:
    """Catches a bucket a parameter, of which there are hundreds, or one for the whole stage."""
    specs = [matrix(i, expert=4) for i in range(6)]
    buckets = plan_layout(specs, edp=2, ep=1, bucket_elements=48).buckets
    assert [bucket.elements for bucket in buckets] == [48, 48, 48]


@pytest.mark.parametrize(("count", "kind"), [(11, "aligned"), (10, "aligned"), (9, "flat")])
def test_auto_is_aligned_up_to_a_tenth_of_padding(count: int, kind: str) -> None:
    """Catches the design's 1.1 compared the wrong way, or with the padding alone."""
    layout = plan_layout([matrix(i) for i in range(count)], edp=11, ep=1)
    assert {bucket.kind for bucket in dense(layout)} == {kind}


def test_one_replica_keeps_whole_matrices_without_padding() -> None:
    """Catches an exchange planned where there is nobody to exchange with."""
    layout = plan_layout([matrix(0, 3, 5), matrix(1, 2, 2), matrix(2, 3, 5)], edp=1, ep=1)
    assert {bucket.kind for bucket in layout.buckets} == {"aligned"}
    assert sum(bucket.padding for bucket in layout.buckets) == 0


@pytest.mark.parametrize("how", ["flat", "aligned"])
def test_dense_can_be_chosen(how: str) -> None:
    """Catches an option that auto overrules."""
    for specs, edp in (([matrix(0)], 8), ([matrix(i) for i in range(8)], 8)):
        layout = plan_layout(specs, edp, 1, dense=how)
        assert {bucket.kind for bucket in dense(layout)} == {how}


@pytest.mark.parametrize(
    ("specs", "dense", "says"),
    [
        ([matrix(0), matrix(0)], "auto", "0 comes twice"),
        ([Spec("w", (5,), muon=True, expert=False)], "auto", r"w of shape \(5,\)"),
        ([Spec("w", (5, 0), muon=True, expert=False)], "auto", r"w of shape \(5, 0\)"),
        ([matrix(0)], "whole", "not whole"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(specs: list[Spec], dense: str, says: str) -> None:
    """Catches two parameters of one name that share a slot, and an option that does nothing."""
    with pytest.raises(ValueError, match=says):
        plan_layout(specs, 2, 1, dense=dense)


@pytest.mark.parametrize(
    ("offset", "size", "says"), [(1, 8, "begins at 1"), (0, 5, "5 elements"), (0, 7, "7 elements")]
)
def test_a_bucket_with_a_gap_or_without_room_cannot_be_made(
    offset: int, size: int, says: str
) -> None:
    """Catches a bucket built by hand whose views would overlap or run over its end."""
    with pytest.raises(ValueError, match=says):
        Bucket("dp", 2, "flat", (Slot(matrix(0), offset),), size)


# --- Kimi K2 ------------------------------------------------------------------------------


@pytest.mark.parametrize("edp", K2_EDP.values())
@pytest.mark.parametrize("stage", [0, 1, 15])
def test_k2_is_not_padded(stage: int, edp: int) -> None:
    """Catches bytes sent for nothing at 256, 512 and 2,048 ranks."""
    layout = k2_layout(stage, edp)
    assert sum(bucket.padding for bucket in experts(layout)) == 0
    buckets = dense(layout)
    assert sum(b.size for b in buckets) <= 1.01 * sum(b.elements for b in buckets)


def test_k2s_dense_matrices_on_their_owners_would_be_padded_many_times() -> None:
    """Catches ``aligned`` computed wrongly: it is the reason for flat shards (design 4.5)."""
    specs = [slot.spec for b in k2_layout(1, 8).buckets for slot in b.slots]
    buckets = dense(plan_layout(specs, 8, 16, dense="aligned"))
    assert len([m for b in buckets for m in b.matrices]) == 36
    assert sum(b.size for b in buckets) > 12 * sum(b.elements for b in buckets)
