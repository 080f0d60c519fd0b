"""Timelines as Chrome trace JSON."""

import json
from pathlib import Path
from typing import Any

from kimi_pretrain.pipeline.costs import Costs, Phases
from kimi_pretrain.pipeline.schedules import interleaved_1f1b, k2
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import P2P, Interval, Timeline
from kimi_pretrain.telemetry.trace import write_chrome_trace

COSTS = Costs((1,) * 4, Phases(2, 1, 2, 1), Phases(2, 1, 2, 1), Phases(1, 0, 1, 0), p2p=0.5)


def events(path: Path, *timelines: Timeline) -> list[dict[str, Any]]:
    write_chrome_trace(timelines, path)
    return json.loads(path.read_text())["traceEvents"]


def test_a_process_a_rank_and_a_thread_a_resource(tmp_path: Path) -> None:
    """Catches seconds taken for microseconds, and ranks that share a process."""
    found = events(tmp_path / "trace.json", simulate(k2(2, 2, 4), COSTS))
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert names == {0: "rank 0", 1: "rank 1"}
    threads = [e["args"]["name"] for e in found if e["name"] == "thread_name" and e["pid"] == 0]
    assert {"compute", "all-to-all", "p2p"} <= set(threads)
    first = next(e for e in found if e["ph"] == "X")
    assert (first["name"], first["ts"], first["dur"]) == ("0F0", 0, 5e6)
    assert {e["name"] for e in found} >= {"0F0 attend", "0F0 dispatch", "0SEND_F0", "0W0"}


def test_slices_of_a_thread_nest(tmp_path: Path) -> None:
    """Catches slices that cross: a viewer drops or misplaces one of the two."""
    both = [simulate(make(2, 2, 8), COSTS) for make in (k2, interleaved_1f1b)]
    crossing = Timeline(
        "crossing",
        (
            (
                Interval(0, "1SEND_F0", P2P, "1SEND_F0", 0, 2),
                Interval(0, "2SEND_B0", P2P, "2SEND_B0", 1, 3),
            ),
        ),
    )
    found = [e for e in events(tmp_path / "trace.json", *both, crossing) if e["ph"] == "X"]
    for key in {(e["pid"], e["tid"]) for e in found}:
        open_until: list[float] = []
        on_thread = [e for e in found if (e["pid"], e["tid"]) == key]
        for event in sorted(on_thread, key=lambda e: (e["ts"], -e["dur"])):
            start, end = event["ts"], event["ts"] + event["dur"]
            open_until = [until for until in open_until if until > start + 1e-3]
            assert all(end <= until + 1e-3 for until in open_until)
            open_until.append(end)


def test_planned_and_measured_stay_apart(tmp_path: Path) -> None:
    """Catches a measured rank drawn over the planned one, or far below it."""
    planned = simulate(k2(2, 2, 4), COSTS)
    measured = Timeline("measured", planned.ranks)
    found = events(tmp_path / "trace.json", planned, measured)
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    order = {e["pid"]: e["args"]["sort_index"] for e in found if e["name"] == "process_sort_index"}
    assert [names[process] for process in sorted(names, key=order.__getitem__)] == [
        "rank 0, k2",
        "rank 0, measured",
        "rank 1, k2",
        "rank 1, measured",
    ]
