"""What the actions of a schedule cost, in seconds: the input of the simulator."""

from dataclasses import dataclass, fields
from math import isfinite

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import COMPUTE, Kind


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of the four phases of one layer, for one microbatch and one direction.

    ``attend`` and ``expert`` compute; ``dispatch`` and ``combine`` are the expert all-to-all.
    """

    attend: float = 0.0
    dispatch: float = 0.0
    expert: float = 0.0
    combine: float = 0.0

    @property
    def compute(self) -> float:
        """Seconds on the compute resource."""
        return self.attend + self.expert

    @property
    def communication(self) -> float:
        """Seconds on the network."""
        return self.dispatch + self.combine


@dataclass(frozen=True, slots=True)
class Extra:
    """Seconds of compute that one stage has beside its layers."""

    forward: float = 0.0
    backward: float = 0.0  # input gradient
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of everything a schedule does, for one microbatch.

    ``backward`` is the input gradient alone (I); B costs ``backward`` and ``weight``. Phases
    and copies are those of one layer and count once for each of the stage's ``layers``.

    Raises ConfigError where a number is negative or not finite, where no stage is given, or
    where weight gradients are said to communicate.
    """

    layers: tuple[int, ...]  # [stages]
    forward: Phases
    backward: Phases
    weight: Phases = Phases()  # attend and expert only
    first: Extra = Extra()  # the embedding, on stage 0
    last: Extra = Extra()  # the head and the loss, on the last stage
    p2p: float = 0.0  # a message between two ranks
    offload: float = 0.0  # the copy of one layer's saved activations from the device
    prefetch: float = 0.0  # and back
    recompute: float = 0.0  # of one layer, where a RECOMPUTE stands; else it is in ``backward``

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            rule = "every stage holds at least one layer"
            raise ConfigError("costs.layers", self.layers, rule, "(1, 1)")
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Phases | Extra):
                for inner in fields(value):
                    _check(f"costs.{part.name}.{inner.name}", getattr(value, inner.name))
            elif part.name != "layers":
                _check(f"costs.{part.name}", value)
        if self.weight.communication:
            rule = "weight gradients need no all-to-all"
            raise ConfigError("costs.weight", self.weight, rule, "dispatch=0 and combine=0")

    @classmethod
    def uniform(
        cls, stages: int, forward: float, backward: float, weight: float, p2p: float = 0.0
    ) -> "Costs":
        """``stages`` equal stages by their totals, without all-to-all.

        ``backward`` is the input gradient alone: B takes ``backward + weight`` seconds.
        """
        return cls(
            layers=(1,) * stages,
            forward=Phases(attend=forward),
            backward=Phases(attend=backward),
            weight=Phases(attend=weight),
            p2p=p2p,
        )

    def extra(self, stage: int) -> Extra:
        """What ``stage`` computes beside its layers; a lone stage has both ends."""
        at_first, at_last = stage == 0, stage == len(self.layers) - 1
        ends = [self.first] * at_first + [self.last] * at_last
        return Extra(
            sum(end.forward for end in ends),
            sum(end.backward for end in ends),
            sum(end.weight for end in ends),
        )

    def compute_seconds(self, kind: Kind, stage: int) -> float:
        """Seconds that a compute action keeps its rank's compute resource busy."""
        assert kind in COMPUTE, kind
        layers, extra = self.layers[stage], self.extra(stage)
        seconds = 0.0
        if kind is Kind.F:
            seconds += layers * self.forward.compute + extra.forward
        if kind in (Kind.I, Kind.B):
            seconds += layers * self.backward.compute + extra.backward
        if kind in (Kind.W, Kind.B):
            seconds += layers * self.weight.compute + extra.weight
        return seconds

    def alone_seconds(self, kind: Kind, stage: int) -> float:
        """Seconds of a compute action that nothing overlaps: its all-to-all is exposed."""
        communication = 0.0
        if kind is Kind.F:
            communication = self.forward.communication
        elif kind in (Kind.I, Kind.B):
            communication = self.backward.communication
        return self.compute_seconds(kind, stage) + self.layers[stage] * communication


def _check(what: str, seconds: float) -> None:
    if not (isfinite(seconds) and seconds >= 0.0):
        raise ConfigError(what, seconds, "seconds are finite and not negative", "0.0")
