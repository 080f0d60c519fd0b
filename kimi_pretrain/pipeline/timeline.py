"""When each rank did what: a step as intervals, simulated or measured.

A measured step is kept as JSON lines, one file a rank, ``RUN/trace/rank-0003.jsonl``: first
``{"clock_offset": seconds}``, which added to this rank's clock gives the clock that all ranks
share, then one row an interval, in seconds of this rank's clock.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

from kimi_pretrain.config.errors import ConfigError

COMPUTE: Final = "compute"
ALL_TO_ALL: Final = "all-to-all"
P2P: Final = "p2p"
COPY: Final = "copy"
RESOURCES: Final = (COMPUTE, ALL_TO_ALL, P2P, COPY)

Span = tuple[float, float]

_MESSAGE = re.compile(r"([0-9]+)(SEND|RECV)_([FB])([0-9]+)")
_ACTION = re.compile(r"[0-9]+[A-Z_]+[0-9]+( [\w.]+)?")


class Interval(NamedTuple):
    """A stretch of time in which one rank used one resource."""

    rank: int
    node: str  # the node's text: "3F4", "(3F4;7I3)OVERLAP_F_B", "3SEND_F4"
    resource: str  # of RESOURCES; a message is its sender's
    name: str  # an action, and the phase within it if there are several: "3F4 attend"
    start: float  # seconds since the step began
    end: float


@dataclass(frozen=True)
class Peak:
    """The most activations that one rank holds for backward at once."""

    stages: int  # microbatches times stages
    layers: int  # microbatches times layers


@dataclass(frozen=True)
class Timeline:
    """One step of all ranks. ``peaks`` and ``critical_path`` are known of simulated steps."""

    name: str
    ranks: tuple[tuple[Interval, ...], ...]  # [pp] intervals of each rank
    peaks: tuple[Peak, ...] | None = None  # [pp]
    critical_path: float | None = None  # seconds: forward, backward, messages of one microbatch

    @cached_property
    def seconds(self) -> float:
        """The step's time: until the last rank is done with everything."""
        return max((interval.end for rank in self.ranks for interval in rank), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """[pp] seconds in which each rank computes."""
        return tuple(_length(self.spans(rank, COMPUTE)) for rank in range(len(self.ranks)))

    @property
    def bubbles(self) -> tuple[float, ...]:
        """[pp] share of the step in which each rank computes nothing, whatever the reason."""
        return tuple(1.0 - busy / self.seconds if self.seconds else 0.0 for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The mean of ``bubbles`` over the ranks."""
        return sum(self.bubbles) / len(self.bubbles)

    @cached_property
    def exposed_all_to_all(self) -> tuple[float, ...]:
        """[pp] seconds of each rank's all-to-all under which it computes nothing."""
        return tuple(_length(self.exposed(rank)) for rank in range(len(self.ranks)))

    @cached_property
    def exposed_p2p(self) -> tuple[float, ...]:
        """[pp] seconds of messages to each rank under which it computes nothing."""
        return tuple(
            _length(without(merged(messages), self.spans(rank, COMPUTE)))
            for rank, messages in enumerate(self._messages_to())
        )

    @property
    def exposed_communication(self) -> tuple[float, ...]:
        """[pp] seconds of all-to-all or messages under which each rank computes nothing."""
        return tuple(
            _length(
                without(
                    merged([*self.spans(rank, ALL_TO_ALL), *messages]),
                    self.spans(rank, COMPUTE),
                )
            )
            for rank, messages in enumerate(self._messages_to())
        )

    def spans(self, rank: int, resource: str) -> list[Span]:
        """When ``rank`` used ``resource``: apart and in order."""
        used = ((i.start, i.end) for i in self.ranks[rank] if i.resource == resource)
        return merged(used)

    def exposed(self, rank: int) -> list[Span]:
        """When ``rank`` did all-to-all and computed nothing."""
        return without(self.spans(rank, ALL_TO_ALL), self.spans(rank, COMPUTE))

    def _messages_to(self) -> list[list[Span]]:
        """[pp] when messages to each rank were on their way."""
        holder = {
            int(_stage(interval.name)): interval.rank
            for rank in self.ranks
            for interval in rank
            if interval.resource == COMPUTE
        }
        messages: list[list[Span]] = [[] for _ in self.ranks]
        for rank in self.ranks:
            for interval in rank:
                if interval.resource == P2P and "SEND" in interval.name:
                    step = 1 if "SEND_F" in interval.name else -1
                    receiver = holder.get(int(_stage(interval.name)) + step)
                    if receiver is not None:
                        messages[receiver].append((interval.start, interval.end))
        return messages


def _stage(name: str) -> str:
    """The stage's number, with which the name of every interval begins."""
    return name[: len(name) - len(name.lstrip("0123456789"))]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of ``spans``: apart and in order."""
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            if end > union[-1][1]:
                union[-1] = (union[-1][0], end)
        else:
            union.append((start, end))
    return union


def without(spans: Sequence[Span], holes: Sequence[Span]) -> list[Span]:
    """What of ``spans`` lies outside ``holes``; both apart and in order, and so the result."""
    left, position = [], 0
    for start, end in spans:
        while position < len(holes) and holes[position][1] <= start:
            position += 1
        ahead = position
        while ahead < len(holes) and holes[ahead][0] < end:
            if holes[ahead][0] > start:
                left.append((start, holes[ahead][0]))
            start = max(start, holes[ahead][1])
            ahead += 1
        if start < end:
            left.append((start, end))
    return left


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


class TraceRows:
    """Writes one rank's intervals to ``directory``; a context manager.

    ``clock_offset``: seconds that added to this rank's clock give the clock all ranks share.
    """

    def __init__(self, directory: Path, rank: int, clock_offset: float = 0.0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._file = (directory / f"rank-{rank:04d}.jsonl").open("w", encoding="utf-8")
        self._file.write(json.dumps({"clock_offset": clock_offset}) + "\n")

    def add(self, node: str, resource: str, name: str, start: float, end: float) -> None:
        """One interval, in seconds of this rank's clock; see Interval."""
        row = Interval(self._rank, node, resource, name, start, end)
        self._file.write(json.dumps(row._asdict()) + "\n")

    def close(self) -> None:
        """All rows are in the file."""
        self._file.close()

    def __enter__(self) -> "TraceRows":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def messages(intervals: Iterable[Interval]) -> list[Interval]:
    """``intervals`` with every message once, its sender's, where both ends have a row.

    It is under way once it is sent and somebody receives it, until either end knows that it is
    done: a gloo rank does not before it waits, which one that sends does last of all.
    """
    rest: list[Interval] = []
    sent: list[tuple[tuple[int, str, str], Interval]] = []
    received: dict[tuple[int, str, str], Interval] = {}  # by stage that sent, direction, number
    for interval in intervals:
        message = _MESSAGE.fullmatch(interval.name)
        if message is None:
            rest.append(interval)
            continue
        stage, end, direction, microbatch = message.groups()
        if end == "SEND":
            sent.append(((int(stage), direction, microbatch), interval))
        else:
            source = int(stage) + (-1 if direction == "F" else 1)
            received[source, direction, microbatch] = interval
    for key, interval in sent:
        other = received.get(key, interval)
        start = max(interval.start, other.start)
        rest.append(interval._replace(start=start, end=max(start, min(interval.end, other.end))))
    return rest


def read_rows(directory: Path, name: str = "measured") -> Timeline:
    """The measured step whose rows lie in ``directory``, on one clock that starts at 0; see
    ``messages``.

    Raises ConfigError where there are none, where a rank's file is missing, or where a row
    is not one of TraceRows'.
    """
    paths = sorted(directory.glob("rank-*.jsonl"))
    rows = messages(interval for path in paths for interval in _read(path))
    if not rows:
        rule = "a trace holds rank-*.jsonl with at least one interval"
        raise ConfigError("trace", str(directory), rule, "training with logging.trace_step=3")
    pp = 1 + max(interval.rank for interval in rows)
    if len(paths) != pp:
        rule = f"its rows are of ranks up to {pp - 1}, and {len(paths)} files are there"
        raise ConfigError("trace", str(directory), rule, "the files of all ranks")
    first = min(interval.start for interval in rows)
    ranks: list[list[Interval]] = [[] for _ in range(pp)]
    for row in sorted(rows, key=lambda interval: interval.start):
        ranks[row.rank].append(row._replace(start=row.start - first, end=row.end - first))
    return Timeline(name, tuple(tuple(rank) for rank in ranks))


def _read(path: Path) -> list[Interval]:
    """The intervals of one file, on the clock that all ranks share."""
    header, *lines = path.read_bytes().split(b"\n")
    try:
        offset = float(json.loads(header)["clock_offset"])
    except (ValueError, TypeError, KeyError):
        raise _bad_row(path, 1, header, "the first row is {clock_offset: seconds}") from None
    intervals = []
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        try:
            row = Interval(**json.loads(line))
            rank, start, end = int(row.rank), float(row.start) + offset, float(row.end) + offset
        except (ValueError, TypeError):
            fields = ", ".join(Interval._fields)
            raise _bad_row(path, number, line, f"a row has {fields}") from None
        if row.resource not in RESOURCES or not _ACTION.fullmatch(str(row.name)):
            rule = f"resources are {', '.join(RESOURCES)}, names are as '3F4 attend'"
            raise _bad_row(path, number, line, rule)
        if not (rank >= 0 and -inf < start <= end < inf):
            raise _bad_row(
                path, number, line, "ranks count from 0, and no interval ends before it starts"
            )
        intervals.append(row._replace(rank=rank, start=start, end=end))
    return intervals


def _bad_row(path: Path, number: int, line: bytes, rule: str) -> ConfigError:
    shown = line[:80].decode("utf-8", "replace")
    return ConfigError(f"{path.name}, row {number}", shown, rule, "tracing the run again")
