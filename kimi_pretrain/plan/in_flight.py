"""What a rank holds at once, in bytes, as its row of a schedule adds and frees it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from kimi_pretrain.pipeline.actions import COMPUTE, Action, Kind, Node, Schedule, leaves
from kimi_pretrain.plan.activations import Kept

Place = tuple[int, int]  # stage, microbatch


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

    What F leaves is held until its backward comes to it, segment by segment; inputs of products
    from then until W, where there is one, as are the gradients of their outputs. In a pair both go
    on in turn. What is offloaded is still on the device during the next computation, and what comes
    back is there from when its PREFETCH stands; what is recomputed ahead, from its RECOMPUTE.
    """
    device: dict[Place, float] = {}  # where something is, however little
    owed: dict[Place, float] = {}  # gradients of outputs, from I to W
    leaving: list[Place] = []
    ahead: set[Place] = set()  # computed again already
    now = host = 0.0
    moments = []
    for node in schedule.ranks[rank]:
        most, within, computes = now, 0.0, False
        here = set(device)
        if leaves(node)[0].kind in COMPUTE:
            computes = True
            most += _most_within(
                [
                    _changes(leaf, kept[leaf.stage], (leaf.stage, leaf.microbatch) in ahead)
                    for leaf in _in_turn(node)
                ]
            )
        for leaf in leaves(node):
            place, stage = (leaf.stage, leaf.microbatch), kept[leaf.stage]
            after = device.get(place, 0.0)
            match leaf.kind:
                case Kind.F:
                    after = stage.total
                case Kind.PREFETCH:
                    host -= stage.host
                    if place in leaving:  # it has not left yet
                        leaving.remove(place)
                    else:
                        after += stage.host
                case Kind.RECOMPUTE:
                    after += sum(stage.again.values())
                    ahead.add(place)
                case Kind.OFFLOAD:
                    leaving.append(place)
                    host += stage.host
                case Kind.I:
                    after = stage.inputs
                    owed[place] = stage.until_w
                case Kind.W:
                    after = 0.0
                    within = owed.pop(place)
                case Kind.B:
                    after = 0.0
                    within = stage.until_w / stage.layers  # each is done before the next one's
            now += after - device.pop(place, 0.0)
            if after:
                device[place] = after
                here.add(place)
        moments.append(Held(max(now, most), host, len(here), sum(owed.values()) + within))
        if computes:  # the copies before this computation are done
            for place in leaving:
                now -= kept[place[0]].host
                device[place] -= kept[place[0]].host
                if not device[place]:
                    del device[place]
            leaving = []
    return moments


def _in_turn(node: Node) -> list[Action]:
    """The actions of a node in the order in which they take turns: of a pair the backward first."""
    return list(reversed(leaves(node)))


def _changes(action: Action, kept: Kept, ahead: bool) -> list[float]:
    """What an action adds to the device, segment by segment.

    ``ahead``: what it would compute again is there already, and goes with the rest.
    """
    match action.kind:
        case Kind.F:
            return [segment.kept for segment in kept.segments]
        case Kind.I:
            return [s.inputs - s.kept - s.again * ahead for s in reversed(kept.segments)]
        case Kind.B:
            return [-s.kept - s.again * ahead for s in reversed(kept.segments)]
        case _:
            return []


def _most_within(strands: list[list[float]]) -> float:
    """The most that is added at once if strands take turns."""
    most = now = 0.0
    for turn in zip_longest(*strands, fillvalue=0.0):
        for change in turn:
            now += change
            most = max(most, now)
    return most
