"""Plays the rows of all ranks against each other: what runs when, and what waits for what.

Every rank does its nodes in order; a node starts when the rank is free and all that it waits for
has happened. Which rank is looked at first does not change the outcome, so one replay that comes
to its end proves that no timing can make the ranks block each other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from kimi_pretrain.pipeline.actions import Action, Kind, Node, Schedule, leaves
from kimi_pretrain.pipeline.errors import ScheduleError

Event = tuple[Kind, int, int]  # kind, stage, microbatch; a B counts as I and W
Needs = Callable[[Action], Iterable[Event]]
Span = tuple[float, float]  # start and end

# A forward is the unit; input and weight gradients cost about as much each. Moving data is free:
# a replay settles the order, `simulate` the time.
COST = {Kind.F: 1.0, Kind.I: 1.0, Kind.W: 1.0, Kind.B: 2.0}


def compute_needs(stages: int) -> Needs:
    """What a compute action waits for if data arrives the moment it is there."""

    def needs(action: Action) -> Iterable[Event]:
        stage, microbatch = action.stage, action.microbatch
        match action.kind:
            case Kind.F:
                if stage:
                    yield Kind.F, stage - 1, microbatch
            case Kind.I | Kind.B:
                yield Kind.F, stage, microbatch
                if stage < stages - 1:
                    yield Kind.I, stage + 1, microbatch
            case Kind.W:
                yield Kind.I, stage, microbatch

    return needs


class Replay:
    """A replay that can be stopped by a block and go on when the rows ahead were changed."""

    def __init__(self, ranks: Sequence[Sequence[Node]], needs: Needs) -> None:
        self.ranks = ranks  # read as the replay goes: what lies ahead may be changed in place
        self.needs = needs
        self.heads = [0] * len(ranks)
        self.spans: list[list[Span]] = [[] for _ in ranks]  # of the nodes done
        self.done: dict[Event, float] = {}  # when it happened
        self._clocks = [0.0] * len(ranks)

    def missing(self, *actions: Action) -> Event | None:
        """The first event that one of the actions waits for."""
        done = self.done
        for action in actions:
            for event in self.needs(action):
                if event not in done:
                    return event
        return None

    def run(self) -> bool:
        """Goes on until all rows are done (True) or no rank can move (False)."""
        waiting: dict[Event, list[int]] = defaultdict(list)
        runnable = list(range(len(self.ranks)))
        while runnable:
            rank = runnable.pop()
            row = self.ranks[rank]
            while self.heads[rank] < len(row):
                actions = leaves(row[self.heads[rank]])
                event = self.missing(*actions)
                if event is not None:
                    waiting[event].append(rank)
                    break
                for event in self._do(rank, actions):
                    runnable += waiting.pop(event, ())
        return all(head == len(row) for head, row in zip(self.heads, self.ranks, strict=True))

    def _do(self, rank: int, actions: tuple[Action, ...]) -> list[Event]:
        start, cost, events = self._clocks[rank], 0.0, []
        for action in actions:
            for event in self.needs(action):
                start = max(start, self.done[event])
            cost += COST.get(action.kind, 0.0)
            kinds = (Kind.I, Kind.W) if action.kind is Kind.B else (action.kind,)
            events += [(kind, action.stage, action.microbatch) for kind in kinds]
        end = start + cost
        self.done.update(dict.fromkeys(events, end))
        self.spans[rank].append((start, end))
        self._clocks[rank] = end
        self.heads[rank] += 1
        return events


def spans(schedule: Schedule, needs: Needs) -> list[list[Span]]:
    """[pp] start and end of each node, in forwards.

    Raises:
        ScheduleError: the ranks block each other, or wait for what never happens.
    """
    replay = Replay(schedule.ranks, needs)
    if not replay.run():
        raise blocked(schedule, replay)
    return replay.spans


def blocked(schedule: Schedule, replay: Replay) -> ScheduleError:
    """Says where the ranks stand and what each waits for; the first named is the culprit.

    That is a rank that waits for something of its own, else the first one.
    """
    stuck = []
    for rank, (head, row) in enumerate(zip(replay.heads, schedule.ranks, strict=True)):
        if head < len(row):
            event = replay.missing(*leaves(row[head]))
            assert event is not None
            stuck.append((schedule.placement[event[1]] != rank, rank, head, str(row[head]), event))
    stuck.sort()
    _, rank, position, node, _ = stuck[0]
    waits = [f"rank {r} ({n}) for {s}{k}{m}" for _, r, _, n, (k, s, m) in stuck[:4]]
    more = f" and {len(stuck) - 4} ranks more" if len(stuck) > 4 else ""
    rule = f"it waits forever: {', '.join(waits)}{more}"
    fix = "an order in which what is waited for comes first"
    return ScheduleError(schedule.name, rank, position, node, rule, fix)
