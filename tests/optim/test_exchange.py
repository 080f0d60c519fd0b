"""The exchange: both sides agree, what arrives is whole, and what need not travel does not."""

from hypothesis import given, settings

from kimi_pretrain.optim.exchange import Exchange, plan_exchange
from kimi_pretrain.optim.layout import Bucket, Layout, Spec, plan_layout
from tests.optim.stage_cases import k2_layout, layouts

SMALL = 96  # ranks: every pair of them is looked at


def exchanges(bucket: Bucket, ep_index: int) -> list[Exchange]:
    return [plan_exchange(bucket, rank, ep_index) for rank in range(bucket.ranks)]


def groups(layout: Layout) -> list[tuple[Bucket, int]]:
    """Every bucket with the ep index of each group that has it."""
    return [
        (bucket, ep_index)
        for bucket in layout.buckets
        for ep_index in range(layout.ep if bucket.group == "edp" else 1)
    ]


@given(layouts(SMALL))
@settings(deadline=None)
def test_what_one_sends_the_other_receives(layout: Layout) -> None:
    """Catches sides that disagree about sizes or order: a hang, or a matrix of another's rows."""
    for bucket, ep_index in groups(layout):
        ranks = exchanges(bucket, ep_index)
        for rank, exchange in enumerate(ranks):
            assert len(exchange.send) == len(exchange.receive) == bucket.ranks
            for peer, segments in enumerate(exchange.send):
                assert segments == ranks[peer].receive[rank]


@given(layouts(SMALL))
@settings(deadline=None)
def test_an_owner_gets_each_matrix_whole_and_once(layout: Layout) -> None:
    """Catches a hole or an overlap in what Newton-Schulz reads."""
    for bucket, ep_index in groups(layout):
        had = []
        for rank, exchange in enumerate(exchanges(bucket, ep_index)):
            arrived: dict[int, list[tuple[int, int]]] = {}
            for segments in exchange.receive:
                for segment in segments:
                    arrived.setdefault(segment.matrix, []).append((segment.start, segment.stop))
            for number, pieces in arrived.items():
                matrix = bucket.matrices[number]
                starts, stops = zip(*pieces, strict=True)
                assert (starts[0], stops[-1]) == (matrix.offset, matrix.stop)
                assert starts[1:] == stops[:-1]
            had += [*exchange.local, *arrived]
            assert all(
                bucket.owner(number, ep_index) == rank for number in (*exchange.local, *arrived)
            )
        assert sorted(had) == list(range(len(bucket.matrices)))


@given(layouts(SMALL))
@settings(deadline=None)
def test_a_rank_sends_only_what_it_holds(layout: Layout) -> None:
    """Catches a read beyond a rank's shard."""
    for bucket, ep_index in groups(layout):
        for rank, exchange in enumerate(exchanges(bucket, ep_index)):
            for segments in exchange.send:
                for segment in segments:
                    assert rank * bucket.shard <= segment.start
                    assert segment.stop <= (rank + 1) * bucket.shard


@given(layouts(SMALL))
@settings(deadline=None)
def test_all_ranks_know_whether_there_is_an_exchange(layout: Layout) -> None:
    """Catches a collective that some ranks enter and others do not."""
    for bucket, ep_index in groups(layout):
        ranks = exchanges(bucket, ep_index)
        travels = any(
            segments and peer != rank
            for rank, exchange in enumerate(ranks)
            for peer, segments in enumerate(exchange.send)
        )
        assert [exchange.moves for exchange in ranks] == [travels] * bucket.ranks


@given(layouts())
@settings(deadline=None)
def test_a_plan_is_made_for_one_of_thousands_of_ranks(layout: Layout) -> None:
    """Catches a plan whose last rank falls off the end of the padding."""
    for bucket, ep_index in groups(layout)[:8]:
        last = plan_exchange(bucket, bucket.ranks - 1, ep_index)
        assert len(last.send) == bucket.ranks
        if bucket.ranks == 1:
            assert not last.moves


def test_whole_matrices_stay() -> None:
    """Catches experts that travel although their holder owns them."""
    layout = plan_layout([Spec("experts", (8, 4, 4), muon=True, expert=True)], edp=4, ep=2)
    (bucket,) = layout.buckets
    for rank, exchange in enumerate(exchanges(bucket, 1)):
        assert exchange.local == (2 * rank, 2 * rank + 1)
        assert not exchange.moves
        assert not any(exchange.send)


def test_adamw_never_travels() -> None:
    """Catches an exchange of what is updated where it lies."""
    layout = plan_layout([Spec("embed", (9, 4), muon=False, expert=False)], edp=4, ep=1)
    assert exchanges(layout.buckets[0], 0) == [Exchange((), ((),) * 4, ((),) * 4, False)] * 4


def test_k2s_lent_experts_go_whole_and_by_group() -> None:
    """Catches loans of one edp group that another follows."""
    layout = k2_layout(1, 8)
    moving = {
        ep_index
        for bucket, ep_index in groups(layout)
        if bucket.group == "edp" and plan_exchange(bucket, 0, ep_index).moves
    }
    assert moving
    for bucket, ep_index in groups(layout):
        if bucket.group == "edp":
            for segments in plan_exchange(bucket, 3, ep_index).send:
                for number, start, stop in segments:
                    matrix = bucket.matrices[number]
                    assert (start, stop) == (matrix.offset, matrix.stop)
