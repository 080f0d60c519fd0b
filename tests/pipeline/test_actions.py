"""The intermediate representation."""

from dataclasses import FrozenInstanceError, replace

import pytest

from kimi_pretrain.pipeline.actions import Action, Kind, Overlap, leaves
from kimi_pretrain.pipeline.schedules import interleaved_1f1b, k2


def test_text_of_actions() -> None:
    """Catches a text that torch.distributed.pipelining would not read."""
    forward, backward = Action(Kind.F, 3, 4), Action(Kind.I, 7, 3)
    assert str(Action(Kind.SEND_B, 12, 0)) == "12SEND_B0"
    assert str(Overlap(forward, backward)) == "(3F4;7I3)OVERLAP_F_B"
    assert leaves(Overlap(forward, backward)) == (forward, backward)
    assert leaves(forward) == (forward,)


def test_a_schedule_cannot_be_changed() -> None:
    """Catches a pass or an executor that edits what all ranks have agreed on."""
    schedule = k2(2, 2, 4)
    assert isinstance(schedule.ranks, tuple)
    assert all(isinstance(row, tuple) for row in schedule.ranks)
    with pytest.raises(FrozenInstanceError):
        schedule.vpp = 3  # type: ignore[misc]
    assert {schedule: 1}[k2(2, 2, 4)] == 1


def test_schedules_are_equal_where_their_ranks_do_the_same() -> None:
    """Catches a schedule that differs from itself after a round trip for its name."""
    schedule = interleaved_1f1b(2, 2, 4)
    assert schedule == replace(schedule, name="other", in_flight=None)
    assert schedule != k2(2, 2, 4)


def test_digest_tells_what_the_ranks_do() -> None:
    """Catches ranks that start with different schedules and hang in the first exchange."""
    schedule = k2(2, 2, 4)
    assert schedule.digest() == replace(schedule, name="other").digest()
    first, second = schedule.ranks
    others = [replace(schedule, ranks=(second, first)), k2(2, 2, 5), interleaved_1f1b(2, 2, 4)]
    assert len({schedule.digest(), *(other.digest() for other in others)}) == 4
