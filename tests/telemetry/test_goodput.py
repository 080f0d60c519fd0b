"""Goodput over the starts of a run directory."""

from pathlib import Path

import pytest

from kimi_pretrain.telemetry.goodput import launched, read_launches, share
from kimi_pretrain.telemetry.jsonl import JsonlSink, truncate_after


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def start(run_dir: Path, clock: Clock, first_step: int, steps: int, seconds: float) -> float:
    """A start that takes so many steps, and is then gone; its last step's goodput."""
    truncate_after(run_dir, first_step)
    goodput = launched(run_dir, clock.now, ranks=4, first_step=first_step, total_steps=20)
    goodput._clock = clock
    sink, told = JsonlSink(run_dir), 0.0
    for step in range(first_step + 1, first_step + 1 + steps):
        clock.now += seconds
        told = goodput.step(seconds)
        sink.row("step", {"step": step, "step_seconds": seconds, "goodput": told})
    sink.close()
    return told


def test_steps_that_are_taken_again_and_time_down_are_lost(tmp_path: Path) -> None:
    """Catches replayed steps counted twice, and a life that begins anew with each start."""
    clock = Clock()
    assert start(tmp_path, clock, 0, 8, 1.0) == 1.0
    clock.now += 12  # nobody is there to start it
    # from the checkpoint of step 5: three steps were in vain
    assert start(tmp_path, clock, 5, 5, 1.0) == pytest.approx(10 / 25)
    assert [row["first_step"] for row in read_launches(tmp_path)] == [0, 5]


def test_a_launch_cut_short_does_not_join_the_next_ones_line(tmp_path: Path) -> None:
    """Catches a run that cannot start because a kill tore its list of starts."""
    clock = Clock()
    start(tmp_path, clock, 0, 1, 1.0)
    path = tmp_path / "launches.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": 10')
    start(tmp_path, clock, 1, 1, 1.0)
    assert len(read_launches(tmp_path)) == 2


def test_a_complete_run_started_again_is_no_launch(tmp_path: Path) -> None:
    """Catches a run that changes though nothing is trained."""
    clock = Clock()
    start(tmp_path, clock, 0, 20, 1.0)
    before = (tmp_path / "launches.jsonl").read_bytes()
    launched(tmp_path, clock.now, ranks=4, first_step=20, total_steps=20)
    assert (tmp_path / "launches.jsonl").read_bytes() == before


def test_a_clock_that_was_set_back_gives_no_more_than_all() -> None:
    """Catches a goodput of 300 %, or a division by zero at the first step."""
    assert share(3.0, 1.0) == 1.0
    assert share(3.0, 0.0) == 1.0
