"""Proves of a schedule what its executor relies on, or says where it is wrong."""

from collections.abc import Iterator, Sequence

from kimi_pretrain.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Overlap,
    Schedule,
    leaves,
)
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.replay import spans
from kimi_pretrain.pipeline.transfers import peer_stage, schedule_needs, transfer

Places = dict[Action, tuple[int, int]]  # rank and position


def verify(
    schedule: Schedule,
    *,
    in_flight: int | Sequence[int] | None = None,
    forward_only: bool = False,
) -> None:
    """Checks a schedule, with or without sends and receives, offloads or pairs.

    - Every stage does F and either B or I and W of every microbatch, once, on the rank that holds
      it; a pair is of two microbatches; nothing else is there.
    - If any rank sends, whatever crosses ranks is sent and received once, and two ranks see the
      messages of one direction in the same order.
    - What leaves the device comes back.
    - All ranks come to their end, whatever the timing, both with buffered sends and with sends
      that block until their receive is posted.
    - No rank keeps more (stage, microbatch) for backward at once than it may.

    Args:
        schedule: to check.
        in_flight: the most a rank may keep, one number or [pp]; None: what the schedule promises.
        forward_only: there are no backwards.

    Raises:
        ScheduleError: names rank and position.
    """
    _check_shape(schedule)
    places = _places(schedule)
    _check_work(schedule, places, forward_only)
    if any(action.kind in SENDS or action.kind in RECEIVES for action in places):
        _check_messages(schedule, places)
    _check_offloads(schedule, places)
    # Buffered sends block least: what fails here is out of order, what only fails then is a
    # receive that comes too late.
    spans(schedule, schedule_needs(schedule, rendezvous=False))
    spans(schedule, schedule_needs(schedule, rendezvous=True))
    if not forward_only:
        _check_in_flight(schedule, in_flight)


def _check_shape(schedule: Schedule) -> None:
    name, pp, placement = schedule.name, schedule.pp, schedule.placement
    if len(schedule.ranks) != pp or pp < 1:
        raise ScheduleError(name, None, None, len(schedule.ranks), f"one row a rank, {pp}", "pp")
    held = [placement.count(rank) for rank in range(pp)]
    if len(placement) != schedule.stages or held != [schedule.vpp] * pp:
        rule = f"every rank holds {schedule.vpp} of {schedule.stages} stages"
        raise ScheduleError(name, None, None, placement, rule, "another placement")


def _nodes(schedule: Schedule) -> Iterator[tuple[int, int, Action | Overlap]]:
    for rank, row in enumerate(schedule.ranks):
        for position, node in enumerate(row):
            yield rank, position, node


def _places(schedule: Schedule) -> Places:
    """Where each action is; refuses what is out of range, on the wrong rank, or there twice."""
    places: Places = {}
    for rank, position, node in _nodes(schedule):
        if isinstance(node, Overlap):
            if node.forward.kind is not Kind.F or node.backward.kind not in BACKWARD:
                rule = "a pair is a forward and a backward (I or B)"
                raise _wrong(schedule, rank, position, rule, "(3F4;7I3)OVERLAP_F_B")
            if node.forward.microbatch == node.backward.microbatch:
                rule = "a pair is of two microbatches: a backward follows its own forward"
                raise _wrong(schedule, rank, position, rule, "one more warm-up forward")
        for action in leaves(node):
            stage, microbatch = action.stage, action.microbatch
            if not (0 <= stage < schedule.stages and 0 <= microbatch < schedule.microbatches):
                rule = f"{schedule.stages} stages and {schedule.microbatches} microbatches, from 0"
                raise _wrong(schedule, rank, position, rule, "one of these")
            if schedule.placement[stage] != rank:
                holder = f"rank {schedule.placement[stage]}"
                raise _wrong(schedule, rank, position, f"stage {stage} is on {holder}", holder)
            if action in places:
                rule = f"{action} is at position {places[action][1]} already"
                raise _wrong(schedule, rank, position, rule, "leaving one out")
            places[action] = rank, position
    return places


def _wrong(schedule: Schedule, rank: int, position: int, rule: str, fix: str) -> ScheduleError:
    node = str(schedule.ranks[rank][position])
    return ScheduleError(schedule.name, rank, position, node, rule, fix)


def _check_work(schedule: Schedule, places: Places, forward_only: bool) -> None:
    """Every stage does its part of every microbatch, and no part in two ways."""
    for stage, rank in enumerate(schedule.placement):
        for microbatch in range(schedule.microbatches):
            f, b, i, w = (
                Action(kind, stage, microbatch) for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
            )
            backward = [action for action in (b, i, w) if action in places]
            if f not in places:
                raise _absent(schedule, rank, f)
            if forward_only and backward:
                rule = "nothing but forwards is done"
                raise _wrong(schedule, *places[backward[0]], rule, "leaving it out")
            if b in places and len(backward) > 1:
                rule = f"{b} is I and W of the same, and there as well"
                raise _wrong(schedule, *places[backward[1]], rule, "leaving one out")
            if not forward_only and b not in places:
                if not backward:
                    raise _absent(schedule, rank, b)
                if len(backward) == 1:
                    raise _absent(schedule, rank, w if i in places else i)


def _absent(schedule: Schedule, rank: int, action: Action) -> ScheduleError:
    rule = f"the rank of stage {action.stage} does it once"
    return ScheduleError(schedule.name, rank, None, f"no {action}", rule, f"adding {action}")


def _check_messages(schedule: Schedule, places: Places) -> None:
    """Sends and receives are what the compute actions need, in one order at both ends."""
    wanted: set[Action] = set()
    for action in places:
        if action.kind in COMPUTE:
            wanted.update(transfer(action, schedule.placement) or ())
    found = {action for action in places if action.kind in SENDS or action.kind in RECEIVES}
    for action in sorted(wanted - found, key=str):
        raise _absent(schedule, schedule.placement[action.stage], action)
    for action in sorted(found - wanted, key=str):
        rule = "nothing travels there: no such neighbour, or it is on the same rank"
        raise _wrong(schedule, *places[action], rule, "leaving it out")
    sent: dict[tuple[int, int], list[Action]] = {}  # (sender, receiver) -> receives to come
    for rank, _, node in _nodes(schedule):
        if isinstance(node, Action) and node.kind in SENDS:
            to = peer_stage(node)
            receive = Kind.RECV_F if node.kind is Kind.SEND_F else Kind.RECV_B
            queue = sent.setdefault((rank, schedule.placement[to]), [])
            queue.append(Action(receive, to, node.microbatch))
    queues = {pair: iter(queue) for pair, queue in sent.items()}
    for rank, position, node in _nodes(schedule):
        if isinstance(node, Action) and node.kind in RECEIVES:
            sender = schedule.placement[peer_stage(node)]
            expected = next(queues[sender, rank])
            if node != expected:
                rule = f"rank {sender} sends {expected} first: both ends have the same order"
                raise _wrong(schedule, rank, position, rule, f"{expected} here")


def _check_offloads(schedule: Schedule, places: Places) -> None:
    """What leaves comes back, before its backward and never after it."""
    for action, (rank, position) in places.items():
        if action.kind is Kind.OFFLOAD:
            back = Action(Kind.PREFETCH, action.stage, action.microbatch)
            if back not in places:
                rule = f"what leaves comes back: there is no {back}"
                raise _wrong(schedule, rank, position, rule, f"adding {back}")


def _check_in_flight(schedule: Schedule, in_flight: int | Sequence[int] | None) -> None:
    """A forward's activations are kept until its B or W is done."""
    bound = schedule.in_flight if in_flight is None else in_flight
    if bound is None:
        return
    bounds = [bound] * schedule.pp if isinstance(bound, int) else list(bound)
    for rank, (row, most) in enumerate(zip(schedule.ranks, bounds, strict=True)):
        kept = 0
        for position, node in enumerate(row):
            kinds = [action.kind for action in leaves(node)]
            kept += kinds.count(Kind.F)
            if kept > most:
                rule = f"it keeps {kept} (stage, microbatch) for backward, at most {most}"
                raise _wrong(schedule, rank, position, rule, "fewer ahead")
            kept -= kinds.count(Kind.B) + kinds.count(Kind.W)
