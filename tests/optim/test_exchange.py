"""The exchange: both sides agree, what arrives is whole, and what need not travel does not."""

from hypothesis import given, settings

from kimi_pretrain.optim.exchange import Exchange, plan_exchange
from kimi_pretrain.optim.layout import Bucket, Layout, Spec, plan_layout
from tests.optim.stage_cases import k2_layout, layouts
from tests.optim.stage_cases import lent as loans

SMALL = 48  # ranks: every pair of them is looked at


def exchanges(bucket: Bucket, layout: Layout) -> list[Exchange]:
    return [plan_exchange(bucket, rank, layout.ep) for rank in range(layout.dp)]


@given(layouts(SMALL))
@settings(deadline=None)
def test_what_one_sends_the_other_receives(layout: Layout) -> None:
    """Catches sides that disagree about sizes or order: a hang, or a matrix of another's rows."""
    for bucket in layout.buckets:
        ranks = exchanges(bucket, layout)
        for rank, exchange in enumerate(ranks):
            assert len(exchange.send) == len(exchange.receive) == layout.dp
            for peer, segments in enumerate(exchange.send):
                assert segments == ranks[peer].receive[rank]


@given(layouts(SMALL))
@settings(deadline=None)
def test_an_owner_gets_each_matrix_whole_and_once(layout: Layout) -> None:
    """Catches a hole or an overlap in what Newton-Schulz reads, and experts of two expert-parallel
    ranks taken for one."""
    for bucket in layout.buckets:
        had = []
        for rank, exchange in enumerate(exchanges(bucket, layout)):
            arrived: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for segments in exchange.receive:
                for ep_index, number, start, stop in segments:
                    arrived.setdefault((ep_index, number), []).append((start, stop))
            for (_, number), pieces in arrived.items():
                matrix = bucket.matrices[number]
                starts, stops = zip(*pieces, strict=True)
                assert (starts[0], stops[-1]) == (matrix.offset, matrix.stop)
                assert starts[1:] == stops[:-1]
            here = rank % layout.ep if bucket.group == "edp" else 0
            owned = [*((here, number) for number in exchange.local), *arrived]
            assert all(bucket.owners[ep_index][number] == rank for ep_index, number in owned)
            had += owned
        numbers = range(len(bucket.matrices))
        assert sorted(had) == [(e, number) for e in range(len(bucket.owners)) for number in numbers]


@given(layouts(SMALL))
@settings(deadline=None)
def test_a_rank_sends_only_what_it_holds(layout: Layout) -> None:
    """Catches a read beyond a rank's shard, or of experts that it has not."""
    for bucket in layout.buckets:
        for rank, exchange in enumerate(exchanges(bucket, layout)):
            edp, ep_index = divmod(rank, layout.ep) if bucket.group == "edp" else (rank, 0)
            for segments in exchange.send:
                for segment in segments:
                    assert segment.ep_index == ep_index
                    assert edp * bucket.shard <= segment.start
                    assert segment.stop <= (edp + 1) * bucket.shard


@given(layouts(SMALL))
@settings(deadline=None)
def test_all_ranks_know_whether_there_is_an_exchange(layout: Layout) -> None:
    """Catches a collective that some ranks enter and others do not."""
    for bucket in layout.buckets:
        ranks = exchanges(bucket, layout)
        travels = any(
            segments and peer != rank
            for rank, exchange in enumerate(ranks)
            for peer, segments in enumerate(exchange.send)
        )
        assert [exchange.moves for exchange in ranks] == [travels] * layout.dp


@given(layouts())
@settings(deadline=None)
def test_a_plan_is_made_for_one_of_thousands_of_ranks(layout: Layout) -> None:
    """Catches a plan whose last rank falls off the end of the padding."""
    for bucket in layout.buckets:
        last = plan_exchange(bucket, layout.dp - 1, layout.ep)
        assert len(last.send) == layout.dp
        if layout.dp == 1:
            assert not last.moves


def test_whole_matrices_stay() -> None:
    """Catches experts that travel although their holder owns them."""
    layout = plan_layout([Spec("experts", (8, 4, 4), muon=True, expert=True)], edp=4, ep=2)
    (bucket,) = layout.buckets
    for rank, exchange in enumerate(exchanges(bucket, layout)):
        assert exchange.local == (2 * (rank // 2), 2 * (rank // 2) + 1)
        assert not exchange.moves
        assert not any(exchange.send)


def test_adamw_never_travels() -> None:
    """Catches an exchange of what is updated where it lies."""
    layout = plan_layout([Spec("embed", (9, 4), muon=False, expert=False)], edp=4, ep=1)
    assert exchanges(layout.buckets[0], layout) == [Exchange((), ((),) * 4, ((),) * 4, False)] * 4


def test_k2s_lent_experts_go_whole() -> None:
    """Catches loans of pieces, which Newton-Schulz cannot take, or none at all."""
    layout = k2_layout(1, 8)
    lent = 0
    for bucket in layout.buckets:
        if bucket.group == "edp":
            for rank in range(layout.dp):
                for segments in plan_exchange(bucket, rank, layout.ep).send:
                    for _, number, start, stop in segments:
                        matrix = bucket.matrices[number]
                        assert (start, stop) == (matrix.offset, matrix.stop)
                        lent += 1
    assert lent == sum(loans(layout).values()) > 0
