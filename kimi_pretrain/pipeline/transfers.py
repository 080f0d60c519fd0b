"""What travels between stages, and what each action of a whole schedule waits for."""

from collections.abc import Iterable, Sequence

from kimi_pretrain.pipeline.actions import RECEIVES, SENDS, Action, Kind, Schedule, leaves
from kimi_pretrain.pipeline.replay import Event, Needs, compute_needs


def transfer(action: Action, placement: Sequence[int]) -> tuple[Action, Action] | None:
    """The send and the receive that a compute action's result needs.

    None where nobody else wants it: the stage at the end, a neighbour on the same rank, a W.
    """
    stage, microbatch = action.stage, action.microbatch
    match action.kind:
        case Kind.F:
            to, send, receive = stage + 1, Kind.SEND_F, Kind.RECV_F
        case Kind.I | Kind.B:
            to, send, receive = stage - 1, Kind.SEND_B, Kind.RECV_B
        case _:
            return None
    if not 0 <= to < len(placement) or placement[to] == placement[stage]:
        return None
    return Action(send, stage, microbatch), Action(receive, to, microbatch)


def peer_stage(action: Action) -> int:
    """The stage at the other end of a send or a receive."""
    return action.stage + (1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1)


def has_p2p(schedule: Schedule) -> bool:
    """Whether sends and receives are in it."""
    kinds = SENDS | RECEIVES
    return any(
        leaf.kind in kinds for row in schedule.ranks for node in row for leaf in leaves(node)
    )


def schedule_needs(schedule: Schedule, *, rendezvous: bool) -> Needs:
    """What every action waits for, sends, receives and offloads included.

    Args:
        schedule: the whole.
        rendezvous: a send blocks its rank until the receive is posted (the hardest backend);
            else it is buffered. A receive never blocks, the compute that needs it does.
    """
    compute = compute_needs(schedule.stages)
    placement, p2p = schedule.placement, has_p2p(schedule)
    ahead: dict[tuple[int, int], set[Kind]] = {}  # what is done to the kept before its backward
    for row in schedule.ranks:
        for node in row:
            for leaf in leaves(node):
                if leaf.kind in (Kind.PREFETCH, Kind.RECOMPUTE):
                    ahead.setdefault((leaf.stage, leaf.microbatch), set()).add(leaf.kind)

    def needs(action: Action) -> Iterable[Event]:
        kind, stage, microbatch = action.kind, action.stage, action.microbatch
        match kind:
            case Kind.F | Kind.I | Kind.B:
                for event in compute(action):
                    if not p2p or placement[event[1]] == placement[stage]:
                        yield event
                    elif event[1] < stage:
                        yield Kind.SEND_F, stage - 1, microbatch
                        yield Kind.RECV_F, stage, microbatch
                    else:
                        yield Kind.SEND_B, stage + 1, microbatch
                        yield Kind.RECV_B, stage, microbatch
                if kind is not Kind.F:
                    for before in sorted(ahead.get((stage, microbatch), ())):
                        yield before, stage, microbatch
            case Kind.W:
                yield Kind.I, stage, microbatch
            case Kind.SEND_F:
                yield Kind.F, stage, microbatch
                if rendezvous:
                    yield Kind.RECV_F, stage + 1, microbatch
            case Kind.SEND_B:
                yield Kind.I, stage, microbatch
                if rendezvous:
                    yield Kind.RECV_B, stage - 1, microbatch
            case Kind.OFFLOAD:
                yield Kind.F, stage, microbatch
            case Kind.PREFETCH:
                yield Kind.OFFLOAD, stage, microbatch
            case Kind.RECOMPUTE:
                yield Kind.F, stage, microbatch
                if Kind.PREFETCH in ahead[stage, microbatch]:
                    yield Kind.PREFETCH, stage, microbatch

    return needs
