"""Timelines as Chrome trace JSON, which https://ui.perfetto.dev and chrome://tracing open.

One process a rank, planned and measured apart; threads compute, all-to-all, p2p, copy. On the
compute thread a node of the schedule (3F4) spans its phases (attend, expert). What one thread
cannot show at once, as messages to two neighbours, goes to a second thread of the same name.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kimi_pretrain.pipeline.timeline import COMPUTE, RESOURCES, Interval, Timeline

_Event = dict[str, Any]
_MICROSECONDS = 1e6
# Threads of a resource are numbered from here, process identifiers of a timeline likewise.
_THREADS, _PROCESSES = 10, 10_000


def write_chrome_trace(timelines: Sequence[Timeline], path: Path) -> None:
    """Writes ``timelines`` of the same step (as planned, as measured) to one file."""
    events: list[_Event] = []
    for number, timeline in enumerate(timelines):
        for rank, intervals in enumerate(timeline.ranks):
            process = number * _PROCESSES + rank
            title = f"rank {rank}" if len(timelines) == 1 else f"rank {rank}, {timeline.name}"
            # Ranks one below the other, each as planned above as measured.
            order = rank * len(timelines) + number
            events.append(_meta("process_name", process, 0, name=title))
            events.append(_meta("process_sort_index", process, 0, sort_index=order))
            for index, resource in enumerate(RESOURCES):
                used = [interval for interval in intervals if interval.resource == resource]
                events += _thread(process, index * _THREADS, resource, used)
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))
    path.write_text(text, encoding="utf-8")


def nodes(intervals: Sequence[Interval]) -> Iterator[list[Interval]]:
    """The intervals of one resource, in order of time, one list a node of the schedule."""
    group: list[Interval] = []
    for interval in sorted(intervals, key=lambda interval: interval.start):
        if group and interval.node != group[0].node:
            yield group
            group = []
        group.append(interval)
    if group:
        yield group


def _thread(
    process: int, first: int, resource: str, intervals: Sequence[Interval]
) -> Iterator[_Event]:
    free: list[float] = []  # when each thread of this resource can show the next node
    for node in nodes(intervals):
        start, end = node[0].start, max(interval.end for interval in node)
        lane = next((lane for lane, until in enumerate(free) if until <= start), len(free))
        thread = first + lane
        if lane == len(free):
            free.append(end)
            title = resource if lane == 0 else f"{resource} {lane + 1}"
            yield _meta("thread_name", process, thread, name=title)
            yield _meta("thread_sort_index", process, thread, sort_index=thread)
        free[lane] = end
        if resource == COMPUTE:
            yield _slice(process, thread, node[0]._replace(name=node[0].node, end=end))
        if resource != COMPUTE or len(node) > 1:
            for interval in node:
                yield _slice(process, thread, interval)


def _slice(process: int, thread: int, interval: Interval) -> _Event:
    return {
        "ph": "X",
        "name": interval.name,
        "cat": interval.resource,
        "pid": process,
        "tid": thread,
        "ts": round(interval.start * _MICROSECONDS, 3),
        "dur": round((interval.end - interval.start) * _MICROSECONDS, 3),
        "args": {"node": interval.node},
    }


def _meta(kind: str, process: int, thread: int, **arguments: object) -> _Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": arguments}
