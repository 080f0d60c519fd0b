"""Passes: pure functions from a schedule to one that does the same work in another way.

Their order: `overlap_expert_comm`, `split_weight_grad`, `limit_weight_grad`, `insert_p2p`,
`insert_offload`, `insert_recompute`.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from kimi_pretrain.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    SENDS,
    Action,
    Kind,
    Node,
    Overlap,
    Schedule,
    leaves,
)
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.replay import Replay, blocked, compute_needs, spans
from kimi_pretrain.pipeline.transfers import has_p2p, transfer


def overlap_expert_comm(schedule: Schedule, apart: Sequence[int] | None = None) -> Schedule:
    """Joins a forward and the backward next to it into a pair, whose all-to-alls hide each other.

    Two nodes become a pair if the forward directly precedes the backward, their microbatches
    differ, and the ranks do not block each other with it: a pair ends as a whole, so neither half
    may wait for what another rank makes of the other. `k2` has the additional warm-up forward
    that makes pairs of the whole steady state.

    Args:
        schedule: of compute actions.
        apart: [pp] how many nodes at a rank's start, its warm-up, stay as they are; None: 0.

    Raises:
        ScheduleError: sends and receives are in already, or the ranks block each other.
    """
    _refuse_p2p(schedule, "overlap_expert_comm")
    leave = [0] * schedule.pp if apart is None else apart
    ranks = [
        [*row[:count], *_paired(row[count:])]
        for row, count in zip(schedule.ranks, leave, strict=True)
    ]
    replay = Replay(ranks, compute_needs(schedule.stages))
    while not replay.run():
        split = False
        for row, head in zip(ranks, replay.heads, strict=True):
            node = row[head] if head < len(row) else None
            if isinstance(node, Overlap) and replay.missing(node.forward) is None:
                row[head : head + 1] = leaves(node)
                split = True
        if not split:
            raise blocked(replace(schedule, ranks=_rows(ranks)), replay)
    return replace(schedule, ranks=_rows(ranks))


def _paired(row: Sequence[Node]) -> list[Node]:
    out: list[Node] = []
    for node in row:
        last = out[-1] if out else None
        if (
            isinstance(last, Action)
            and isinstance(node, Action)
            and last.kind is Kind.F
            and node.kind in BACKWARD
            and last.microbatch != node.microbatch
        ):
            out[-1] = Overlap(last, node)
        else:
            out.append(node)
    return out


def split_weight_grad(schedule: Schedule, delay: Sequence[int] | None = None) -> Schedule:
    """Splits each B into I and W: the previous stage gets its gradient before W is done.

    W comes right after its I, or after its I's send where that is in the schedule, or after the
    pair that I is half of: it computes while the gradient travels. (That the last layer's W is
    done last of all, after the send has begun, is the executor's order within a stage.)

    Args:
        schedule: with B, or partly split already.
        delay: [pp] how many backwards later W comes instead; a rank keeps that much more.
    """
    delays = [0] * schedule.pp if delay is None else list(delay)
    ranks = [_split(row, wait) for row, wait in zip(schedule.ranks, delays, strict=True)]
    bound, everything = schedule.in_flight, schedule.vpp * schedule.microbatches
    if bound is not None:
        bound = tuple(
            min(most + wait, everything) for most, wait in zip(bound, delays, strict=True)
        )
    return replace(schedule, ranks=_rows(ranks), in_flight=bound)


def _split(row: Sequence[Node], delay: int) -> list[Node]:
    out: list[Node] = []
    held: deque[Action] = deque()
    due = False  # the weight gradients beyond the delay follow what is there
    for node in row:
        if due and leaves(node)[0].kind not in SENDS:
            out += _release(held, delay)
            due = False
        if isinstance(node, Action) and node.kind is Kind.B:
            node = _input_only(node)
        elif isinstance(node, Overlap) and node.backward.kind is Kind.B:
            node = Overlap(node.forward, _input_only(node.backward))
        else:
            out.append(node)
            continue
        out.append(node)
        backward = leaves(node)[-1]
        held.append(Action(Kind.W, backward.stage, backward.microbatch))
        due = True
    return [*out, *_release(held, 0)]


def _input_only(action: Action) -> Action:
    return Action(Kind.I, action.stage, action.microbatch)


def _release(held: deque[Action], keep: int) -> list[Action]:
    return [held.popleft() for _ in range(len(held) - keep)]


def limit_weight_grad(schedule: Schedule, most: int) -> Schedule:
    """Puts off at most so many weight gradients of a rank at once.

    What is put off holds the inputs and the gradients of all its products on the device. Before an
    I that would make it more, the oldest W's are computed; the others stay where they are. No rank
    waits for a W, so that none can be blocked by it.

    Args:
        schedule: with I and W, or without.
        most: 0 leaves no I and W at all: each is the B that it was.
    """
    ranks = [_limited(row, most) if most else _whole(row) for row in schedule.ranks]
    return replace(schedule, ranks=_rows(ranks))


def _limited(row: Sequence[Node], most: int) -> list[Node]:
    out: list[Node] = []
    owed: deque[Action] = deque()
    for node in row:
        for action in leaves(node):
            if action.kind is Kind.I:
                out += _release(owed, most - 1)
                owed.append(Action(Kind.W, action.stage, action.microbatch))
        if isinstance(node, Action) and node.kind is Kind.W:
            if node not in owed:
                continue  # it was computed before
            owed.remove(node)
        out.append(node)
    return out


def _whole(row: Sequence[Node]) -> list[Node]:
    out: list[Node] = []
    for node in row:
        if isinstance(node, Overlap):
            out.append(Overlap(node.forward, _with_weights(node.backward)))
        elif node.kind is not Kind.W:
            out.append(_with_weights(node))
    return out


def _with_weights(action: Action) -> Action:
    return replace(action, kind=Kind.B) if action.kind is Kind.I else action


def insert_p2p(schedule: Schedule) -> Schedule:
    """Adds a send and a receive wherever neighbouring stages lie on different ranks.

    A send stands right after the compute that makes what it sends. A receive stands before the
    node that its rank is busy with when the message is sent, if forwards take one unit of time
    and backwards two: one node or more ahead of the compute that needs it, yet not so early
    that its buffer waits for long.

    No backend can block on the outcome. In that one timing every receive is posted before its
    send, so not even a send that waits for its receive waits; and since no node asks what time it
    is, what finishes in one timing finishes in all. Two ranks see the messages of each direction
    in the same order, forwards and backwards mixed as they were sent, as a backend without tags
    needs. The two directions of a pair of ranks are two queues.

    Raises:
        ScheduleError: sends and receives are in already, or the ranks block each other.
    """
    _refuse_p2p(schedule, "insert_p2p")
    times = spans(schedule, compute_needs(schedule.stages))
    sends: list[list[list[Action]]] = [[[] for _ in row] for row in schedule.ranks]
    receives: list[list[list[Action]]] = [[[] for _ in row] for row in schedule.ranks]
    starts = [[start for start, _ in row] for row in times]
    ends = sorted(
        (end, rank, position)
        for rank, row in enumerate(times)
        for position, (_, end) in enumerate(row)
    )
    for end, rank, position in ends:
        for action in leaves(schedule.ranks[rank][position]):
            message = transfer(action, schedule.placement)
            if message is not None:
                send, receive = message
                sends[rank][position].append(send)
                to = schedule.placement[receive.stage]
                busy = bisect_left(starts[to], end) - 1  # the last that has started by then
                receives[to][max(busy, 0)].append(receive)
    ranks = [
        [
            part
            for node, before, after in zip(row, receives[rank], sends[rank], strict=True)
            for part in (*before, node, *after)
        ]
        for rank, row in enumerate(schedule.ranks)
    ]
    return replace(schedule, ranks=_rows(ranks))


def insert_offload(schedule: Schedule) -> Schedule:
    """Adds an offload after each forward and its prefetch one backward ahead.

    An offload stands after the forward's sends, which go first on the wire; a prefetch before
    the backward before its own (before the node before, where there is none). What would have
    to come back at once stays: no node computes between its offload and its prefetch.

    Raises:
        ScheduleError: offloads are in already.
    """
    ranks = [_offloaded(schedule, rank) for rank in range(schedule.pp)]
    return replace(schedule, ranks=_rows(ranks))


def insert_recompute(schedule: Schedule) -> Schedule:
    """Adds a recomputation right before each backward, or the pair that it is half of.

    There it runs while the gradient is on its way. Without it a backward computes again layer by
    layer what it needs, which takes less memory and waits for the gradient first.

    Raises:
        ScheduleError: recomputations are in already.
    """
    ranks = []
    for rank, row in enumerate(schedule.ranks):
        out: list[Node] = []
        for position, node in enumerate(row):
            for action in leaves(node):
                if action.kind is Kind.RECOMPUTE:
                    rule = "insert_recompute runs once"
                    raise ScheduleError(
                        schedule.name, rank, position, str(node), rule, "leave it out"
                    )
                if action.kind in BACKWARD:
                    out.append(Action(Kind.RECOMPUTE, action.stage, action.microbatch))
            out.append(node)
        ranks.append(out)
    return replace(schedule, ranks=_rows(ranks))


def _offloaded(schedule: Schedule, rank: int) -> list[Node]:
    row = schedule.ranks[rank]
    computes = [index for index, node in enumerate(row) if leaves(node)[0].kind in COMPUTE]
    made: dict[tuple[int, int], int] = {}  # (stage, microbatch) -> which compute node made it
    fetch: dict[int, Action] = {}  # position -> the prefetch before it
    leave: dict[int, Action] = {}  # position -> the offload after it
    previous = 0  # which compute node holds the last backward
    first = True
    for number, position in enumerate(computes):
        for action in leaves(row[position]):
            key = action.stage, action.microbatch
            if action.kind is Kind.F:
                made[key] = number
            elif action.kind in BACKWARD:
                before = number - 1 if first else previous
                first = False
                if key in made and before > made[key] + 1:
                    fetch[computes[before]] = Action(Kind.PREFETCH, *key)
                    leave[computes[made[key]]] = Action(Kind.OFFLOAD, *key)
                previous = number
    out: list[Node] = []
    pending: Action | None = None
    for position, node in enumerate(row):
        kind = leaves(node)[0].kind
        if kind in (Kind.OFFLOAD, Kind.PREFETCH):
            rule = "insert_offload runs once"
            raise ScheduleError(schedule.name, rank, position, str(node), rule, "leave it out")
        if pending is not None and kind not in SENDS:
            out.append(pending)
            pending = None
        if position in fetch:
            out.append(fetch[position])
        out.append(node)
        pending = leave.get(position, pending)
    return out if pending is None else [*out, pending]


def _refuse_p2p(schedule: Schedule, what: str) -> None:
    if has_p2p(schedule):
        rule = f"{what} takes a schedule without sends and receives"
        raise ScheduleError(schedule.name, None, None, what, rule, "insert_p2p after it")


def _rows(ranks: Sequence[Sequence[Node]]) -> tuple[tuple[Node, ...], ...]:
    return tuple(tuple(row) for row in ranks)
