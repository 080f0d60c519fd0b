"""What crosses ranks, and whose message it is."""

from kimi_pretrain.pipeline.actions import Action, Kind
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import gpipe
from kimi_pretrain.pipeline.shape import looped_placement, v_placement
from kimi_pretrain.pipeline.transfers import has_p2p, transfer


def test_a_result_travels_where_the_next_stage_lies_elsewhere() -> None:
    """Catches a message within a rank (the fold of a V), one past an end, and a swapped pair."""
    forward = Action(Kind.F, 1, 5)
    assert transfer(forward, looped_placement(2, 2)) == (
        Action(Kind.SEND_F, 1, 5),
        Action(Kind.RECV_F, 2, 5),
    )
    assert transfer(forward, v_placement(2)) is None
    assert transfer(Action(Kind.F, 3, 0), looped_placement(2, 2)) is None
    assert transfer(Action(Kind.I, 0, 0), looped_placement(2, 2)) is None
    assert transfer(Action(Kind.B, 1, 2), looped_placement(2, 2)) == (
        Action(Kind.SEND_B, 1, 2),
        Action(Kind.RECV_B, 0, 2),
    )


def test_messages_are_seen() -> None:
    """Catches a second set of messages put into a schedule that has its own."""
    schedule = gpipe(2, 1, 2)
    assert not has_p2p(schedule)
    assert has_p2p(insert_p2p(schedule))
