"""Owners: every matrix one, work even, lending only where it helps."""

import pytest
from hypothesis import given, settings

from kimi_pretrain.optim.layout import Layout, Spec, plan_layout
from kimi_pretrain.optim.ownership import imbalance, newton_schulz_flops, work
from kimi_pretrain.optim.ownership import lent as count_lent
from tests.optim.stage_cases import K2_EDP, K2_EP, k2_layout, layouts, lent


def design_cost(rows: int, cols: int) -> int:
    """Design 4.5's: max x min^2."""
    return max(rows, cols) * min(rows, cols) ** 2


def test_flops_of_a_newton_schulz_step() -> None:
    """Catches the long side squared, and a count that depends on the orientation."""
    # A = X X^T: 2 m^2 n; A A: 2 m^3; (b A + c A A) X: 2 m^2 n
    assert newton_schulz_flops(2, 3) == newton_schulz_flops(3, 2) == 24 + 16 + 24


@given(layouts())
@settings(deadline=None)
def test_every_matrix_has_one_owner(layout: Layout) -> None:
    """Catches a matrix that nobody orthogonalises, or an owner outside dp."""
    for bucket in layout.buckets:
        rows = {"adamw": 0}.get(bucket.kind, layout.ep if bucket.group == "edp" else 1)
        assert len(bucket.owners) == rows
        for row in bucket.owners:
            assert len(row) == len(bucket.matrices)
            assert all(0 <= owner < layout.dp for owner in row)


@given(layouts())
@settings(deadline=None)
def test_the_ranks_work_is_the_stages(layout: Layout) -> None:
    """Catches work counted once for an edp group instead of once a rank."""
    total = 0
    for bucket in layout.buckets:
        copies = layout.ep if bucket.group == "edp" else 1
        total += copies * sum(5 * newton_schulz_flops(m.rows, m.cols) for m in bucket.matrices)
    loads = work(layout)
    assert len(loads) == layout.dp
    assert sum(loads) == total


@given(layouts())
@settings(deadline=None)
def test_dense_aligned_matrices_stay_with_their_holder(layout: Layout) -> None:
    """Catches an exchange over dp of what was laid out so as not to need one."""
    for bucket in layout.buckets:
        if bucket.group == "dp" and bucket.kind == "aligned":
            holders = tuple(m.offset // bucket.shard for m in bucket.matrices)
            assert bucket.owners == (holders,)


@given(layouts())
@settings(deadline=None)
def test_only_the_busy_lend_and_only_to_who_has_less(layout: Layout) -> None:
    """Catches matrices that travel without need, and a lender that borrows as well."""
    loads = work(layout, steps=1)
    mean = sum(loads) / len(loads)
    costs = {newton_schulz_flops(m.rows, m.cols) for b in layout.buckets for m in b.matrices}
    for holder, owner in lent(layout):
        # What it had before its last loan was above the limit, and more than the borrower has.
        before = loads[holder] + max(costs)
        assert before > 1.05 * mean
        assert loads[owner] <= before


def test_lending_evens_out_a_costly_matrix() -> None:
    """Catches a rank that keeps its experts and a dense matrix worth many of them."""
    specs = [
        Spec("o_proj", (16, 16), muon=True, expert=False),
        Spec("experts", (40, 8, 8), muon=True, expert=True),
    ]
    layout = plan_layout(specs, edp=4, ep=1, dense="flat")
    # An expert costs 1, o_proj 8: 48 over 4 ranks.
    assert sorted(work(layout, 1)) == [12 * newton_schulz_flops(8, 8)] * 4
    (bucket,) = (b for b in layout.buckets if b.kind == "flat")
    lender = bucket.owners[0][0]
    assert {holder for holder, _ in lent(layout)} == {lender}
    assert sum(lent(layout).values()) == count_lent(layout) == 6


@pytest.mark.parametrize("edp", [1, 2])
def test_ranks_of_other_experts_borrow_too(edp: int) -> None:
    """Catches loans to replicas only: with one replica of each expert nobody could lend, and with
    two a rank could get rid of half of what it has too much."""
    specs = [
        Spec("o_proj", (16, 16), muon=True, expert=False),
        Spec("experts", (10 * edp, 8, 8), muon=True, expert=True),
    ]
    layout = plan_layout(specs, edp=edp, ep=4 // edp, dense="flat")
    # An expert costs 1, o_proj 8: 48 over 4 ranks.
    assert sorted(work(layout, 1)) == [12 * newton_schulz_flops(8, 8)] * 4
    (lender,) = {holder for holder, _ in lent(layout)}
    assert {owner for _, owner in lent(layout)} == set(range(4)) - {lender}


def test_lending_ends_where_it_would_move_the_peak() -> None:
    """Catches loans that go back and forth, or that make the borrower the busiest."""
    specs = [
        Spec("o_proj", (16, 16), muon=True, expert=False),
        Spec("experts", (2, 16, 16), muon=True, expert=True),
    ]
    layout = plan_layout(specs, edp=2, ep=1, dense="flat")
    assert not lent(layout)
    assert imbalance(layout) == pytest.approx(4 / 3)


def test_nobody_lends_for_a_few_percent() -> None:
    """Catches bytes that travel every step for less than an expert matrix is worth."""
    experts = Spec("experts", (161, 4, 4), muon=True, expert=True)
    layout = plan_layout([experts], edp=4, ep=1)  # 41, 41, 41 and 38 matrices
    assert imbalance(layout) == pytest.approx(41 / 40.25)
    assert not lent(layout)


def test_the_matrix_that_evens_out_most_is_lent() -> None:
    """Catches many small loans where one will do."""
    specs = [
        Spec("o_proj", (16, 16), muon=True, expert=False),
        Spec("small", (8, 8, 8), muon=True, expert=True),
        Spec("half", (4, 8, 44), muon=True, expert=True),  # costs half an o_proj
    ]
    layout = plan_layout(specs, edp=2, ep=1, dense="flat")
    assert sum(lent(layout).values()) == 1
    assert imbalance(layout) == 1.0


def test_nothing_for_muon_is_balanced() -> None:
    """Catches a division by the zero work of a stage of vectors."""
    layout = plan_layout([Spec("norm", (4,), muon=False, expert=False)], 2, 2)
    assert work(layout) == [0] * 4
    assert imbalance(layout) == 1.0


# --- Kimi K2 ------------------------------------------------------------------------------


@pytest.mark.parametrize("edp", K2_EDP.values())
@pytest.mark.parametrize("cost", [newton_schulz_flops, design_cost])
def test_k2s_four_layer_stages_are_balanced(edp: int, cost) -> None:
    """Catches o_proj on a rank that has as many experts as everyone: 1.4 at 2,048 ranks."""
    assert imbalance(k2_layout(1, edp), cost) <= 1.1


@pytest.mark.parametrize(
    ("stage", "edp", "expected"),
    [
        (0, 1, 1.050),
        (0, 2, 1.045),
        (1, 1, 1.041),
        (1, 2, 1.046),
        (1, 8, 1.025),
        (15, 1, 1.044),
        (15, 2, 1.025),
    ],
)
def test_k2s_stages_are_even_at_256_and_512_ranks(stage: int, edp: int, expected: float) -> None:
    """Catches lending that leaves the last stage at 1.22, having one layer's experts only, or a
    four-layer stage at 1.4: see docs/zero1.md."""
    found = imbalance(k2_layout(stage, edp))
    assert found == pytest.approx(expected, abs=5e-4)
    assert found <= 1.1


@pytest.mark.parametrize(
    ("stage", "expected", "largest"), [(0, 1.157, (18432, 7168)), (15, 1.919, (8192, 7168))]
)
def test_k2s_outer_stages_are_as_even_as_their_largest_matrix_allows_at_2048_ranks(
    stage: int, expected: float, largest: tuple[int, int]
) -> None:
    """Catches an outer stage that slows the pipeline's ranks, and figures that nobody computed."""
    layout, usual = k2_layout(stage, 8), k2_layout(1, 8)
    assert imbalance(layout) == pytest.approx(expected, abs=5e-4)
    # Nothing else is left on that rank: no layout of whole matrices does better.
    busiest = max(work(layout))
    assert busiest == 5 * newton_schulz_flops(*largest)
    assert busiest < 0.9 * max(work(usual))


@pytest.mark.parametrize("edp", K2_EDP.values())
def test_k2s_outer_stages_are_not_the_slowest(edp: int) -> None:
    """Catches a first or last stage for which all others wait."""
    usual = max(work(k2_layout(1, edp)))
    assert all(max(work(k2_layout(stage, edp))) < 0.9 * usual for stage in (0, 15))


def test_k2s_loans_stay_few() -> None:
    """Catches lending that moves more than it must: 4 o_proj, a dozen matrices each."""
    layout = k2_layout(1, 8)
    experts = 36 * layout.dp
    assert layout.ep == K2_EP
    assert 0 < sum(lent(layout).values()) < 0.03 * experts
