"""What a rank holds at once, in bytes, as its row of a schedule adds and frees it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from kimi_pretrain.pipeline.actions import COMPUTE, Action, Kind, Node, Schedule, leaves
from kimi_pretrain.plan.activations import Kept
from kimi_pretrain.plan.backward import Bytes, Step

Place = tuple[int, int]  # stage, microbatch
_NOTHING = Step(Bytes(), Bytes())


@dataclass(frozen=True)
class Held:
    """What one rank holds, at its most or at one moment."""

    device: float  # bytes
    host: float  # bytes that were offloaded and have not come back
    microbatches: int  # (stage, microbatch) of which something is on the device
    gradients: float = 0.0  # bytes beside those on the device: weight gradients wait with them


def most_held(schedule: Schedule, rank: int, kept: Sequence[Kept]) -> Held:
    """The most that a rank holds on its device, gradients included, and on its host.

    The two are not at the same time.
    ``kept`` is what one microbatch leaves on each stage, [stages].
    """
    moments = held_along(schedule, rank, kept)
    fullest = max(moments, key=lambda held: held.device + held.gradients)
    return replace(fullest, host=max(held.host for held in moments))


def held_along(schedule: Schedule, rank: int, kept: Sequence[Kept]) -> list[Held]:
    """[nodes] the most that a rank holds during each node of its row: the order needs no clock.

    What F leaves is held until its backward comes to it, segment by segment, and meanwhile what
    the backward computes again or widens; inputs of products and the gradients of their outputs
    from then until W. Of a whole backward those of the last segment wait until the next
    computation begins. In a pair both go on in turn. What is offloaded is still on the device
    during the next computation, and what comes back is there from when its PREFETCH stands; what
    is recomputed ahead, from its RECOMPUTE.
    """
    device: dict[Place, Bytes] = {}  # where something is, however little
    leaving: list[Place] = []
    ahead: set[Place] = set()  # computed again already
    late: list[Place] = []  # whole backwards of which the last weight gradients wait
    within: dict[tuple[tuple[Kind, int, bool], ...], Bytes] = {}  # few nodes differ in it
    now, host = Bytes(), 0.0
    moments = []
    for node in schedule.ranks[rank]:
        computes = leaves(node)[0].kind in COMPUTE
        if computes:
            for place in late:
                now = now.minus(device.pop(place, Bytes()))
            late = []
        before, most, here = now, now, set(device)
        if computes:
            turns = tuple(
                (leaf.kind, leaf.stage, (leaf.stage, leaf.microbatch) in ahead)
                for leaf in _in_turn(node)
            )
            if turns not in within:
                within[turns] = _most_within([_steps(kind, kept[s], a) for kind, s, a in turns])
            most = before.plus(within[turns])
        for leaf in leaves(node):
            place, stage = (leaf.stage, leaf.microbatch), kept[leaf.stage]
            was = after = device.pop(place, Bytes())
            match leaf.kind:
                case Kind.F:
                    after = Bytes(stage.total)
                case Kind.PREFETCH:
                    host -= stage.host
                    if place in leaving:  # it has not left yet
                        leaving.remove(place)
                    else:
                        after = after.plus(Bytes(stage.host))
                case Kind.RECOMPUTE:
                    after = after.plus(Bytes(sum(stage.again.values())))
                    ahead.add(place)
                case Kind.OFFLOAD:
                    leaving.append(place)
                    host += stage.host
                case Kind.I:
                    after = stage.backward(place in ahead, True).waits
                case Kind.B:
                    after = stage.backward(place in ahead, False).waits
                    late.append(place)
                case Kind.W:
                    after = Bytes()
            if after is not was:
                now = now.plus(after).minus(was)
            if after.total:
                device[place] = after
                here.add(place)
        if now.total > most.total:
            most = now
        moments.append(Held(most.device, host, len(here), most.gradients))
        if computes:  # the copies before this computation are done
            for place in leaving:
                left = device.pop(place, Bytes()).minus(Bytes(kept[place[0]].host))
                now = now.minus(Bytes(kept[place[0]].host))
                if left.total:
                    device[place] = left
            leaving = []
    return moments


def _in_turn(node: Node) -> list[Action]:
    """The actions of a node in the order in which they take turns: of a pair the backward first."""
    return list(reversed(leaves(node)))


def _steps(kind: Kind, kept: Kept, ahead: bool) -> Sequence[Step]:
    """What a computation adds to the device, segment by segment.

    ``ahead``: what it would compute again is there already, and goes with the rest.
    """
    match kind:
        case Kind.F:
            return [Step(Bytes(size), Bytes(size)) for size in kept.forward]
        case Kind.I | Kind.B:
            return kept.backward(ahead, kind is Kind.I).steps
        case _:
            return []


def _most_within(strands: Sequence[Sequence[Step]]) -> Bytes:
    """The most that is added at once if strands take turns."""
    most = now = Bytes()
    for turn in zip_longest(*strands, fillvalue=_NOTHING):
        for step in turn:
            most = max(most, now.plus(step.most), key=_total)
            now = now.plus(step.after)
    return most


def _total(held: Bytes) -> float:
    return held.total
