import pytest

from kimi_pretrain.telemetry.pace import Pace


def test_nothing_is_promised_before_the_first_step() -> None:
    assert Pace().remaining(10) is None


def test_a_pause_does_not_move_the_estimate() -> None:
    """An ETA that jumps to hours because one step waited for a page fault or a compiler."""
    pace = Pace()
    for step in range(40):
        pace.step(300.0 if step in (0, 17) else 2.0)
    assert pace.remaining(100) == pytest.approx(200.0)


def test_a_lasting_change_of_speed_takes_over() -> None:
    pace = Pace(window=16)
    for seconds in [1.0] * 100 + [3.0] * 16:
        pace.step(seconds)
    assert pace.remaining(10) == pytest.approx(30.0)


def test_steps_that_alternate_are_averaged_not_picked() -> None:
    """A median would promise the one or the other."""
    pace = Pace()
    for _ in range(32):
        pace.step(1.0)
        pace.step(2.0)
    assert pace.remaining(10) == pytest.approx(15.0)


def test_the_last_step_leaves_nothing() -> None:
    pace = Pace()
    pace.step(1.0)
    assert pace.remaining(0) == 0.0
