"""One rank's resources in simulated time, and how compute nodes use them layer by layer.

An overlapped pair runs layer by layer, the two microbatches f (forward) and b (backward)
alternating, communication in brackets beside compute:

    [b.combine] | f.attend -> [f.dispatch] | b.expert -> [b.dispatch] | b.expert.W, f.expert
    -> [f.combine] | b.attend -> b.attend.W

The longer of two stages goes on alone. Outside a pair nothing hides the all-to-all: phases
run one after the other.
"""

from dataclasses import dataclass, field

from kimi_pretrain.pipeline.actions import Action, Kind, Node, Overlap
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COMPUTE, COPY, Interval


@dataclass(slots=True)
class Lanes:
    """One rank's resources: until when each is taken, and what it was used for.

    Each does what it is given in the order in which it is given.
    """

    rank: int
    until: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((COMPUTE, ALL_TO_ALL, COPY), 0.0)
    )
    intervals: list[Interval] = field(default_factory=list)

    @property
    def now(self) -> float:
        """When the compute given so far is done: where the rank's program stands."""
        return self.until[COMPUTE]

    def use(self, resource: str, node: str, name: str, seconds: float, after: float) -> float:
        """Takes ``resource`` once it is free and ``after`` is past; says until when."""
        start = max(after, self.until[resource])
        end = start + seconds
        self.until[resource] = end
        if seconds:
            self.intervals.append(Interval(self.rank, node, resource, name, start, end))
        return end

    def run(self, node: Node, costs: Costs, after: float) -> float:
        """A compute node, once ``after`` is past; says when all of it is done."""
        text = str(node)
        self.until[COMPUTE] = max(self.now, after)
        if isinstance(node, Overlap):
            _pair(
                _Forward(self, text, node.forward, costs),
                _Backward(self, text, node.backward, costs),
            )
        elif node.kind is Kind.W:
            seconds = costs.compute_seconds(Kind.W, node.stage)
            self.use(COMPUTE, text, f"{text} weight", seconds, after)
        elif node.kind is Kind.F:
            _Forward(self, text, node, costs).alone()
        else:
            _Backward(self, text, node, costs).alone()
        # The last combine of a pair may outlast its compute, and is awaited too.
        self.until[COMPUTE] = max(self.now, self.until[ALL_TO_ALL])
        return self.now


class _Pass:
    """A forward or a backward of one stage under way: ``ready`` is when it can go on."""

    def __init__(self, lanes: Lanes, node: str, action: Action, costs: Costs) -> None:
        self.lanes, self.node, self.name, self.costs = lanes, node, str(action), costs
        self.layers = costs.layers[action.stage]
        self.at_first = action.stage == 0
        self.at_last = action.stage == len(costs.layers) - 1
        self.ready = lanes.now

    def compute(self, phase: str, seconds: float) -> None:
        """``phase`` on the compute resource, once this pass is ready."""
        self._use(COMPUTE, phase, seconds)

    def communicate(self, phase: str, seconds: float) -> None:
        """``phase`` on the network, once this pass is ready."""
        self._use(ALL_TO_ALL, phase, seconds)

    def _use(self, resource: str, phase: str, seconds: float) -> None:
        name = f"{self.name} {phase}"
        self.ready = self.lanes.use(resource, self.node, name, seconds, self.ready)


class _Forward(_Pass):
    def begin(self) -> None:
        if self.at_first:
            self.compute("embedding", self.costs.first.forward)

    def layer(self) -> None:
        phases = self.costs.forward
        self.compute("attend", phases.attend)
        self.communicate("dispatch", phases.dispatch)
        self.compute("expert", phases.expert)
        self.communicate("combine", phases.combine)

    def end(self) -> None:
        if self.at_last:
            self.compute("head", self.costs.last.forward)

    def alone(self) -> None:
        self.begin()
        for _ in range(self.layers):
            self.layer()
        self.end()


class _Backward(_Pass):
    def __init__(self, lanes: Lanes, node: str, action: Action, costs: Costs) -> None:
        super().__init__(lanes, node, action, costs)
        self.with_weights = action.kind is Kind.B
        self.weight = costs.weight if self.with_weights else Phases()

    def begin(self) -> None:
        if self.at_last:
            self._extra("head", self.costs.last)

    def layer(self) -> None:
        phases = self.costs.backward
        self.communicate("combine", phases.combine)
        self.compute("expert", phases.expert)
        self.weights("expert.W", self.weight.expert)
        self.ready = self.lanes.now
        self.communicate("dispatch", phases.dispatch)
        self.compute("attend", phases.attend)
        self.weights("attend.W", self.weight.attend)
        self.ready = self.lanes.now

    def weights(self, phase: str, seconds: float) -> None:
        """Weight gradients, for which nothing waits."""
        self.lanes.use(COMPUTE, self.node, f"{self.name} {phase}", seconds, 0.0)

    def end(self) -> None:
        if self.at_first:
            self._extra("embedding", self.costs.first)

    def alone(self) -> None:
        self.begin()
        for _ in range(self.layers):
            self.layer()
        self.end()

    def _extra(self, phase: str, extra: Extra) -> None:
        self.compute(phase, extra.backward)
        if self.with_weights:
            self.weights(f"{phase}.W", extra.weight)
            self.ready = self.lanes.now


def _pair(f: _Forward, b: _Backward) -> None:
    b.begin()
    f.begin()
    for layer in range(max(f.layers, b.layers)):
        if layer < min(f.layers, b.layers):
            _paired_layer(f, b)
        elif layer < f.layers:
            f.layer()
        else:
            b.layer()
    f.end()
    b.end()


def _paired_layer(f: _Forward, b: _Backward) -> None:
    forward, backward = f.costs.forward, f.costs.backward
    b.ready = max(b.ready, b.lanes.now)  # issued where the program stands
    b.communicate("combine", backward.combine)
    f.compute("attend", forward.attend)
    f.communicate("dispatch", forward.dispatch)
    b.compute("expert", backward.expert)
    b.communicate("dispatch", backward.dispatch)
    b.weights("expert.W", b.weight.expert)
    f.compute("expert", forward.expert)
    f.communicate("combine", forward.combine)
    b.compute("attend", backward.attend)
    b.weights("attend.W", b.weight.attend)
