"""Timelines: what is computed from intervals, and the files in which measured ones are kept."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.timeline import (
    ALL_TO_ALL,
    COMPUTE,
    P2P,
    Interval,
    Timeline,
    TraceRows,
    merged,
    messages,
    read_rows,
    without,
)

spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 9)).map(lambda s: (float(s[0]), float(sum(s))))
)


@given(spans, spans)
def test_union_and_difference_of_spans(first: list[tuple[float, float]], second: list) -> None:
    """Catches exposed time that is counted twice, or hidden by compute that came later."""

    def cells(stretches: list[tuple[float, float]]) -> set[int]:
        return {cell for start, end in stretches for cell in range(int(start), int(end))}

    left, right = merged(first), merged(second)
    assert cells(left) == cells(first)
    assert all(a[1] < b[0] for a, b in pairwise(left))
    difference = without(left, right)
    assert cells(difference) == cells(first) - cells(second)
    assert sum(end - start for start, end in difference) == len(cells(difference))


def test_what_a_timeline_says() -> None:
    """Catches communication that is hidden by another rank's compute, and shares of a wrong sum."""
    timeline = Timeline(
        "by hand",
        (
            (
                Interval(0, "0F0", COMPUTE, "0F0 attend", 0, 2),
                Interval(0, "0F0", ALL_TO_ALL, "0F0 dispatch", 1, 4),
                Interval(0, "0SEND_F0", P2P, "0SEND_F0", 4, 6),
            ),
            (
                Interval(1, "1F1", COMPUTE, "1F1 attend", 0, 5),
                Interval(1, "1F0", COMPUTE, "1F0 attend", 6, 10),
            ),
        ),
    )
    assert timeline.seconds == 10
    assert timeline.busy == (2, 9)
    assert timeline.bubbles == pytest.approx((0.8, 0.1))
    assert timeline.bubble == pytest.approx(0.45)
    assert timeline.exposed_all_to_all == (2, 0)
    assert timeline.exposed_p2p == (0, 1)
    assert timeline.exposed_communication == (2, 1)
    assert Timeline("nothing", ((), ())).bubble == 0.0


def write(directory: Path, rank: int, offset: float, start: float) -> None:
    with TraceRows(directory, rank, offset) as rows:
        rows.add(f"{rank}F0", COMPUTE, f"{rank}F0 attend", start, start + 2)


def test_rows_of_ranks_come_back_on_one_clock(tmp_path: Path) -> None:
    """Catches offsets that are subtracted, and a step that begins at the machine's boot."""
    write(tmp_path, 0, 100.0, 1000.0)
    write(tmp_path, 1, -100.0, 1203.0)
    timeline = read_rows(tmp_path, "run")
    assert timeline.ranks == (
        (Interval(0, "0F0", COMPUTE, "0F0 attend", 0, 2),),
        (Interval(1, "1F0", COMPUTE, "1F0 attend", 3, 5),),
    )
    assert (timeline.name, timeline.seconds, timeline.peaks) == ("run", 5, None)


def test_the_form_of_the_rows(tmp_path: Path) -> None:
    """Catches a change of the file's form, which other programs read."""
    write(tmp_path / "trace", 3, 0.5, 1.0)
    header, row = (tmp_path / "trace" / "rank-0003.jsonl").read_text().splitlines()
    assert json.loads(header) == {"clock_offset": 0.5}
    assert json.loads(row) == {
        "rank": 3,
        "node": "3F0",
        "resource": "compute",
        "name": "3F0 attend",
        "start": 1.0,
        "end": 3.0,
    }


def test_a_message_is_under_way_between_its_two_ends() -> None:
    """Catches a gloo sender's message that seems to take until the step's end, and one that
    travels before anybody receives."""

    def row(rank: int, name: str, start: float, end: float) -> Interval:
        return Interval(rank, name, P2P, name, start, end)

    alone = row(1, "1SEND_B2", 7, 8)
    compute = Interval(0, "0F0", COMPUTE, "0F0 attend", 0, 1)
    found = messages(
        [
            row(1, "1RECV_F0", 3, 5),
            compute,
            row(0, "0SEND_F0", 1, 90),
            row(0, "0RECV_B1", 2, 90),
            row(1, "1SEND_B1", 4, 6),
            row(0, "0SEND_F3", 1, 90),
            row(1, "1RECV_F3", 0, 0.5),  # clocks that do not quite agree
            alone,
        ]
    )
    assert found == [
        compute,
        row(0, "0SEND_F0", 3, 5),
        row(1, "1SEND_B1", 4, 6),
        row(0, "0SEND_F3", 1, 1),
        alone,
    ]


HEADER = '{"clock_offset": 0}\n'
ROW = '{"rank": 0, "node": "0F0", "resource": "compute", "name": "0F0", "start": 0, "end": 1}\n'


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "first row is"),
        (ROW, "first row is"),
        (HEADER, "at least one interval"),
        (HEADER + "[]", "a row has"),
        (HEADER + "\xff", "a row has"),
        (HEADER + ROW.replace('"rank": 0, ', ""), "a row has"),
        (HEADER + ROW.replace("compute", "disk"), "resources are"),
        (HEADER + ROW.replace('"name": "0F0"', '"name": "forward"'), "resources are"),
        (HEADER + ROW.replace('"end": 1', '"end": -1'), "ends before"),
        (HEADER + ROW.replace('"end": 1', '"end": NaN'), "ends before"),
        (HEADER + ROW.replace('"end": 1', '"end": null'), "a row has"),
        (HEADER + ROW.replace('"rank": 0', '"rank": 2'), "files of all ranks"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, content: str, rule: str) -> None:
    """Catches a traceback, or a figure of half a run, where a file is cut off or not a trace."""
    (tmp_path / "rank-0000.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=rule):
        read_rows(tmp_path)
    with pytest.raises(ConfigError, match="rank-\\*"):
        read_rows(tmp_path / "absent")
