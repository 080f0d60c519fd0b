"""From a measured step to what it should have been: its own schedule at its own costs."""

from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Kind, Schedule
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COMPUTE, COPY, P2P, Interval, Timeline

WHOLE = (Kind.W, Kind.OFFLOAD, Kind.PREFETCH, Kind.RECOMPUTE)  # one interval for a stage


def measured_schedule(timeline: Timeline, name: str = "planned") -> Schedule:
    """What the ranks did, in the order in which they began it; messages are implied.

    Raises:
        ConfigError: the nodes are no schedule's.
    """
    rows = []
    for intervals in timeline.ranks:
        used = [interval for interval in intervals if interval.resource in (COMPUTE, COPY)]
        used.sort(key=lambda interval: interval.start)
        rows.append(",".join(dict.fromkeys(interval.node for interval in used)))
    return Schedule.from_text(rows, name)


def measured_costs(timeline: Timeline, layers: tuple[int, ...] | None = None) -> Costs:
    """What everything took: the median of compute and copies, the least of communication.

    A collective or a message also takes the time in which it waits for a peer, so that only
    the least says what the network needs. ``layers`` ([stages]) are counted unless given.

    Raises:
        ConfigError: no phase of a layer was measured.
    """
    layers = layers or _layers(timeline)
    computed: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    flown: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for stage, kind, phase, interval in _parsed(timeline):
        # One interval for all layers of a stage counts for each of them.
        parts = layers[stage] if kind in WHOLE else 1
        # B has the phases of I, and those of W under names of their own.
        kind = Kind.I if kind == Kind.B else kind
        key = (P2P, "") if interval.resource == P2P else (kind, phase)
        seconds = flown if interval.resource in (ALL_TO_ALL, P2P) else computed
        seconds[key].append((interval.end - interval.start) / parts)

    def middle(kind: Kind, phase: str = "") -> float:
        return median(computed.get((kind, phase), [0.0]))

    def least(kind: str, phase: str = "") -> float:
        return min(flown.get((kind, phase), [0.0]))

    def phases(kind: Kind) -> Phases:
        return Phases(
            # The weighted sum of what came back is computed beside the next layer's attention.
            middle(kind, "attend") + middle(kind, "combine"),
            least(kind, "dispatch"),
            middle(kind, "expert"),
            least(kind, "combine"),
        )

    def extra(phase: str) -> Extra:
        return Extra(middle(Kind.F, phase), middle(Kind.I, phase), middle(Kind.I, f"{phase}.W"))

    return Costs(
        layers,
        phases(Kind.F),
        phases(Kind.I),
        # Either W is an action of its own, or it is part of B; a run has one of the two.
        Phases(
            attend=middle(Kind.W, "weight") or middle(Kind.I, "attend.W"),
            expert=0.0 if (Kind.W, "weight") in computed else middle(Kind.I, "expert.W"),
        ),
        extra("embedding"),
        extra("head"),
        p2p=least(P2P),
        offload=middle(Kind.OFFLOAD),
        prefetch=middle(Kind.PREFETCH),
        recompute=middle(Kind.RECOMPUTE, "again"),
    )


def _layers(timeline: Timeline) -> tuple[int, ...]:
    """[stages] how often a forward of each attended."""
    attends: defaultdict[int, int] = defaultdict(int)
    forwards: defaultdict[int, set[str]] = defaultdict(set)
    for stage, kind, phase, interval in _parsed(timeline):
        if kind == Kind.F and phase == "attend":
            attends[stage] += 1
            forwards[stage].add(interval.name)
    if sorted(attends) != list(range(len(attends))) or not attends:
        rule = "every stage has the phases of its layers, such as '0F0 attend'"
        raise ConfigError("trace", timeline.name, rule, "the trace of a pipeline run")
    return tuple(attends[stage] // len(forwards[stage]) for stage in range(len(attends)))


def _parsed(timeline: Timeline) -> Iterator[tuple[int, str, str, Interval]]:
    """Every interval with the stage, kind and phase that its name says."""
    for intervals in timeline.ranks:
        for interval in intervals:
            action, _, phase = interval.name.partition(" ")
            rest = action.lstrip("0123456789")
            stage = int(action[: len(action) - len(rest)])
            yield stage, rest.rstrip("0123456789"), phase, interval
