"""When an executor computed and what flew meanwhile, for whoever observes it."""

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from kimi_pretrain.ops.streams import Ticket
from kimi_pretrain.parallel.collectives import Handle
from kimi_pretrain.parallel.dispatch import Flight
from kimi_pretrain.pipeline.timeline import COMPUTE

Observe = Callable[[str, str, str, float, float], None]  # node, resource, name, start, end


class _Flying(NamedTuple):
    node: str
    resource: str
    name: str
    start: float
    until: Handle | Flight[object] | Ticket


class Watch:
    """Tells ``observe`` of intervals, in seconds of ``perf_counter``; without it, nothing.

    The host's clock: on a GPU the times at which work was launched. Communication ends in the
    background; it is told to have ended at the first look that finds it done, which is after
    the phase of another microbatch under which it ended, or when somebody has waited for it.
    """

    def __init__(self, observe: Observe | None) -> None:
        self.observe = observe
        self.node = ""  # what the rank is doing
        self._flying: list[_Flying] = []

    def computed(self, action: object, phase: str, start: float) -> None:
        """A phase of an action has been computed, from ``start`` until now."""
        if self.observe is not None:
            self.observe(self.node, COMPUTE, f"{action} {phase}", start, perf_counter())
            self.look()

    def flies(
        self,
        resource: str,
        action: object,
        phase: str,
        start: float,
        until: Handle | Flight[object] | Ticket,
    ) -> None:
        """Something has been under way since ``start``."""
        if self.observe is not None:
            name = f"{action} {phase}" if phase else str(action)
            self._flying.append(_Flying(self.node, resource, name, start, until))

    def look(self) -> None:
        """Tell of what has arrived."""
        if self._flying and self.observe is not None:
            now, flying = perf_counter(), self._flying
            self._flying = []
            for entry in flying:
                if entry.until.done:
                    self.observe(entry.node, entry.resource, entry.name, entry.start, now)
                else:
                    self._flying.append(entry)
