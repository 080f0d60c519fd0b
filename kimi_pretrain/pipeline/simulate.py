"""How long a schedule takes: every node of every rank placed in time.

All resources (``lanes``, and a link from each rank to each it sends to) serve in the order
of the program, so who is asked first changes nothing: a node starts when what it needs is
there and its resource is free. The ranks are advanced in turn, each until it waits for
another.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline import timeline
from kimi_pretrain.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    COPIES,
    SENDS,
    Action,
    Kind,
    Node,
    Overlap,
    Schedule,
    leaves,
)
from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.lanes import Lanes
from kimi_pretrain.pipeline.timeline import COPY, P2P, Interval, Peak, Timeline

# What a node can need, as (what, stage, microbatch): an action of this kind is done, where I
# stands for B too; or the stage's input or the gradient of its output has arrived.
_Need = tuple[str, int, int]
_INPUT, _GRADIENT = "input", "gradient"
_SEND = {Kind.F: Kind.SEND_F, Kind.I: Kind.SEND_B, Kind.B: Kind.SEND_B}


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The timeline of ``schedule`` at ``costs``.

    Where the schedule has SEND and RECV nodes, a message is on its way from when its SEND is
    reached, its RECV is posted and the link is free; else from when its compute is done and
    the link is free. Within a rank it takes no time.

    Raises ConfigError where ``costs`` is of another number of stages, and where no rank can
    go on, (as a ScheduleError) saying what each waits for.
    """
    if len(costs.layers) != schedule.stages:
        rule = f"schedule {schedule.name} has {schedule.stages} stages"
        fix = f"{schedule.stages} numbers of layers"
        raise ConfigError("costs.layers", costs.layers, rule, fix)
    return _Simulation(schedule, costs).run()


def critical_path(schedule: Schedule, costs: Costs) -> float:
    """Seconds of the forwards, input gradients and messages of one microbatch by itself.

    No order of actions on any number of ranks is faster at the same placement.
    """
    hops = sum(a != b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
    kinds = {action.kind for nodes in schedule.ranks for node in nodes for action in leaves(node)}
    ways = [Kind.F] if Kind.F in kinds else []
    ways += [Kind.I] if kinds & BACKWARD else []
    stages = range(schedule.stages)
    return sum(
        hops * costs.p2p + sum(costs.alone_seconds(kind, stage) for stage in stages)
        for kind in ways
    )


@dataclass(slots=True)
class _Link:
    """Messages from one rank to another, one at a time and in the sender's order."""

    free: float = 0.0
    sent: deque[tuple[_Need, str, float]] = field(default_factory=deque)


class _Simulation:
    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.lanes = [Lanes(rank) for rank in range(schedule.pp)]
        self.done: dict[_Need, float] = {}
        self.posted: dict[_Need, float] = {}
        self.links: defaultdict[tuple[int, int], _Link] = defaultdict(_Link)
        self.waiting: dict[_Need, int] = {}
        self.ready = deque(range(schedule.pp))
        # [pp] (time, change in stages, change in layers) of what is held for backward
        self.held: list[list[tuple[float, int, int]]] = [[] for _ in range(schedule.pp)]
        places: defaultdict[Kind, set[tuple[int, int]]] = defaultdict(set)
        for nodes in schedule.ranks:
            for node in nodes:
                for action in leaves(node):
                    places[action.kind].add((action.stage, action.microbatch))
        self.explicit = bool(places[Kind.SEND_F] or places[Kind.SEND_B])
        # A forward without backward, as in evaluation, keeps nothing.
        self.kept = places[Kind.I] | places[Kind.B]
        self.split = places[Kind.W]

    def run(self) -> Timeline:
        positions = [0] * self.schedule.pp
        while self.ready:
            rank = self.ready.popleft()
            nodes = self.schedule.ranks[rank]
            while positions[rank] < len(nodes):
                node = nodes[positions[rank]]
                missing = next((need for need in self._needs(node) if need not in self.done), None)
                if missing is not None:
                    self.waiting[missing] = rank
                    break
                self._do(rank, node)
                positions[rank] += 1
        if self.waiting:
            raise self._deadlock(positions)
        return Timeline(
            self.schedule.name,
            tuple(tuple(lanes.intervals) for lanes in self.lanes),
            tuple(_peak(held) for held in self.held),
            critical_path(self.schedule, self.costs),
        )

    def _needs(self, node: Node) -> Iterator[_Need]:
        for action in leaves(node):
            stage, microbatch = action.stage, action.microbatch
            match action.kind:
                case Kind.F:
                    if stage > 0:
                        yield _INPUT, stage, microbatch
                case Kind.I | Kind.B:
                    yield Kind.F, stage, microbatch
                    if stage < self.schedule.stages - 1:
                        yield _GRADIENT, stage, microbatch
                    if (Kind.OFFLOAD, stage, microbatch) in self.done:
                        yield Kind.PREFETCH, stage, microbatch
                case Kind.RECOMPUTE:
                    yield Kind.F, stage, microbatch
                    if (Kind.OFFLOAD, stage, microbatch) in self.done:
                        yield Kind.PREFETCH, stage, microbatch
                case Kind.W | Kind.SEND_B:
                    yield Kind.I, stage, microbatch
                case Kind.SEND_F | Kind.OFFLOAD:
                    yield Kind.F, stage, microbatch
                case Kind.PREFETCH:
                    yield Kind.OFFLOAD, stage, microbatch

    def _do(self, rank: int, node: Node) -> None:
        after = max((self.done[need] for need in self._needs(node)), default=0.0)
        if isinstance(node, Overlap) or node.kind in COMPUTE:
            self._compute(rank, node, after)
        elif node.kind in COPIES:
            self._copy(rank, node, max(after, self.lanes[rank].now))
        elif node.kind is Kind.RECOMPUTE:
            seconds = self.costs.layers[node.stage] * self.costs.recompute
            self.lanes[rank].use(timeline.COMPUTE, str(node), f"{node} again", seconds, after)
        elif node.kind in SENDS:
            self._send(rank, node, self.lanes[rank].now)
        else:
            self._post(rank, node, self.lanes[rank].now)

    def _compute(self, rank: int, node: Node, after: float) -> None:
        start = max(after, self.lanes[rank].now)
        end = self.lanes[rank].run(node, self.costs, start)
        for action in leaves(node):
            kind, stage, microbatch = action.kind, action.stage, action.microbatch
            place = stage, microbatch
            self._finish((Kind.I if kind is Kind.B else kind, stage, microbatch), end)
            if kind is Kind.F and place in self.kept:
                self._hold(rank, stage, start, 1)
            elif kind is Kind.W or (kind in BACKWARD and place not in self.split):
                self._hold(rank, stage, end, -1)
            if kind is not Kind.W:
                self._pass_on(rank, action, end)

    def _copy(self, rank: int, action: Action, after: float) -> None:
        """A copy begins where it stands; memory is held while it is under way."""
        away = action.kind is Kind.OFFLOAD
        layers = self.costs.layers[action.stage]
        seconds = layers * (self.costs.offload if away else self.costs.prefetch)
        end = self.lanes[rank].use(COPY, str(action), str(action), seconds, after)
        self._finish((action.kind, action.stage, action.microbatch), end)
        self._hold(rank, action.stage, end if away else end - seconds, -1 if away else 1)

    def _pass_on(self, rank: int, action: Action, end: float) -> None:
        """Hands the result of a forward or backward to the stage that needs it."""
        forward = action.kind is Kind.F
        stage = action.stage + (1 if forward else -1)
        if not 0 <= stage < self.schedule.stages:
            return
        if self.schedule.placement[stage] == rank:
            self._finish((_INPUT if forward else _GRADIENT, stage, action.microbatch), end)
        elif not self.explicit:
            self._send(rank, Action(_SEND[action.kind], action.stage, action.microbatch), end)

    def _send(self, rank: int, send: Action, now: float) -> None:
        forward = send.kind is Kind.SEND_F
        stage = send.stage + (1 if forward else -1)
        need: _Need = (_INPUT if forward else _GRADIENT, stage, send.microbatch)
        target = self.schedule.placement[stage]
        self.links[rank, target].sent.append((need, str(send), now))
        self._carry(rank, target)

    def _post(self, rank: int, receive: Action, now: float) -> None:
        forward = receive.kind is Kind.RECV_F
        what = _INPUT if forward else _GRADIENT
        self.posted[what, receive.stage, receive.microbatch] = now
        sender = receive.stage + (-1 if forward else 1)
        self._carry(self.schedule.placement[sender], rank)

    def _carry(self, source: int, target: int) -> None:
        """Moves the messages of a link whose receives are posted, in order."""
        link = self.links[source, target]
        while link.sent:
            need, name, sent = link.sent[0]
            if self.explicit and need not in self.posted:
                return
            link.sent.popleft()
            start = max(sent, self.posted.get(need, 0.0), link.free)
            link.free = start + self.costs.p2p
            if self.costs.p2p:
                interval = Interval(source, name, P2P, name, start, link.free)
                self.lanes[source].intervals.append(interval)
            self._finish(need, link.free)

    def _finish(self, need: _Need, time: float) -> None:
        self.done[need] = time
        waiting = self.waiting.pop(need, None)
        if waiting is not None:
            self.ready.append(waiting)

    def _hold(self, rank: int, stage: int, time: float, change: int) -> None:
        self.held[rank].append((time, change, change * self.costs.layers[stage]))

    def _deadlock(self, positions: list[int]) -> ScheduleError:
        blocked = sorted((rank, need) for need, rank in self.waiting.items())
        waits = ", ".join(
            f"rank {rank} at position {positions[rank]} waits for {_words(need)}"
            for rank, need in blocked
        )
        rank = blocked[0][0]
        node = str(self.schedule.ranks[rank][positions[rank]])
        rule = f"no rank can go on: {waits}"
        fix = "a schedule that verify accepts"
        return ScheduleError(self.schedule.name, rank, positions[rank], node, rule, fix)


def _peak(held: list[tuple[float, int, int]]) -> Peak:
    """The most held at once; of changes at the same time those of earlier nodes come first."""
    stages = layers = most_stages = most_layers = 0
    for _, more_stages, more_layers in sorted(held, key=itemgetter(0)):
        stages, layers = stages + more_stages, layers + more_layers
        most_stages, most_layers = max(most_stages, stages), max(most_layers, layers)
    return Peak(most_stages, most_layers)


def _words(need: _Need) -> str:
    what, stage, microbatch = need
    if what == _INPUT:
        return f"the output of {stage - 1}F{microbatch}"
    if what == _GRADIENT:
        return f"the gradient of {stage + 1}I{microbatch}"
    return f"{stage}{what}{microbatch}"
