"""Schedules as text and JSON, both ways."""

import json

import pytest
from hypothesis import given, settings

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p
from kimi_pretrain.pipeline.schedules import k2
from tests.pipeline.schedule_cases import needs_pinned_torch, schedules


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_round_trip(schedule: Schedule) -> None:
    """Catches a node, a shape or a placement that text or JSON loses."""
    whole = insert_offload(insert_p2p(schedule))
    for each in (schedule, whole):
        assert Schedule.from_text(each.to_text()) == each
        back = Schedule.from_json(each.to_json())
        assert back == each
        assert (back.name, back.in_flight) == (each.name, each.in_flight)


def test_bubbles_and_blanks_are_nothing() -> None:
    """Catches a table written by torch, whose bubbles are empty cells, being refused."""
    rows = ["0F0, 0F1 ,,,0B0,0B1", ",1F0,1B0,( 1F1 ; 1B0 )OVERLAP_F_B,"]
    schedule = Schedule.from_text(rows, name="mine")
    assert schedule.to_text() == ["0F0,0F1,0B0,0B1", "1F0,1B0,(1F1;1B0)OVERLAP_F_B"]
    assert (schedule.pp, schedule.vpp, schedule.microbatches) == (2, 1, 2)
    assert (schedule.name, schedule.placement) == ("mine", (0, 1))


@needs_pinned_torch
def test_torch_reads_every_cell() -> None:
    """Catches a dialect: torch must parse what is written and write it back the same."""
    from torch.distributed.pipelining.schedules import _Action

    for row in insert_p2p(k2(4, 2, 8)).to_text():
        for cell in row.split(","):
            assert str(_Action.from_str(cell)) == cell


@pytest.mark.parametrize(
    ("rows", "rank", "position", "message"),
    [
        (["0F0,0B0", "1F0,1X0"], 1, 1, "got '1X0'; an action is a stage, one of F, I, W, B"),
        (["0F0,0B0", "1F,1B0"], 1, 0, "got '1F'"),
        (["0F0,-1B0"], 0, 1, "got '-1B0'"),
        (["0F0,0B0x"], 0, 1, "got '0B0x'"),
        (["٣F0"], 0, 0, "an action is a stage"),
        (["0F99999999999999999999"], 0, 0, "an action is a stage"),
        (["0F0,(0F1;0B0)"], 0, 1, "an action is a stage"),
        (["0F0,(0B0;0F1)OVERLAP_F_B"], 0, 1, "a pair is a forward and a backward"),
        (["0F0,(0F1;0W0)OVERLAP_F_B"], 0, 1, "a pair is a forward and a backward"),
        (["0F0,0B0", "1F0,0B1"], 1, 1, "stage 0 is on rank 0 already"),
        (["0F0,0B0", "2F0,2B0"], None, None, "got 2; no rank acts for stage 1"),
        (["0F0,0B0,1F0,1B0", "2F0,2B0"], 1, None, "every rank holds as many stages"),
        (["0F0,0B0", ""], 1, None, "every rank holds as many stages"),
        (["0F0,0B0,0F2,0B2"], None, None, "got 2; microbatch 1 is absent"),
        ([""], None, None, "no rank does anything"),
        ([], None, None, "no rank does anything"),
    ],
)
def test_bad_text_is_one_line_that_says_where(
    rows: list[str], rank: int | None, position: int | None, message: str
) -> None:
    """Catches a typing error in a schedule file that ends as an index error or a hang."""
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_text(rows)
    line = str(caught.value)
    assert message in line
    assert "\n" not in line
    assert (caught.value.rank, caught.value.position) == (rank, position)
    if position is not None:
        assert f"rank {rank}, position {position}" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pp": 3}, "schedule.pp: got 3"),
        ({"vpp": True}, "schedule.vpp: got True"),
        ({"microbatches": "4"}, "schedule.microbatches: got '4'"),
        ({"placement": [0, 0, 1, 1]}, "schedule.placement"),
        ({"in_flight": [1]}, "schedule.in_flight"),
        ({"in_flight": [1, None]}, "schedule.in_flight"),
        ({"name": 3}, "schedule.name"),
        ({"ranks": "0F0"}, "schedule.ranks"),
        ({"ranks": [["0F0"]]}, "schedule.ranks"),
        ({"ranks": ["0F0", "1Q0"]}, "rank 1, position 0"),
        ({"more": 1}, "a JSON object of the named fields"),
    ],
)
def test_bad_json_is_refused(change: dict[str, object], message: str) -> None:
    """Catches a file whose numbers and rows contradict each other."""
    plain = json.loads(k2(2, 2, 4).to_json())
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        Schedule.from_json(json.dumps(plain | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    """Catches a traceback for a truncated or foreign file."""
    with pytest.raises(ConfigError, match="schedule: got"):
        Schedule.from_json(text)
