"""Where one rank's time goes: the stretches of a step, one after another, and waits within them.

A wait for other ranks, or for copies, is communication that nothing hides. On a CPU moments are
the host's clock. On an accelerator ``Handle.wait`` holds up the device's stream and not the host,
so moments are events on that stream, and are looked up when the step is over.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter

import torch

# Groups by kind, and copies to the host -> what a wait for them is called. Replicas of experts and
# of dense parameters are two kinds of the same thing here.
_WAITS = {"ep": "ep", "pp": "pp", "edp": "dp", "dp": "dp", "world": "world", "offload": "offload"}

Moment = float | torch.Event


class Stopwatch:
    """Measures steps of one rank; does nothing between ``stop`` and the next ``start``."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = perf_counter) -> None:
        self._device, self._clock = device, clock
        self._marks: list[tuple[str, Moment]] = []  # from when on time goes to which stretch
        self._waits: list[tuple[str, str, Moment, Moment]] = []  # within a stretch, for whom

    @property
    def running(self) -> bool:
        """Whether a step is being measured."""
        return bool(self._marks)

    def start(self, stretch: str) -> None:
        """A step begins, with this stretch."""
        self._marks, self._waits = [(stretch, self.now())], []

    def enter(self, stretch: str) -> None:
        """From now on time goes to another stretch; one may be entered again and again."""
        if self.running:
            self._marks.append((stretch, self.now()))

    def waiting(self, kind: str) -> AbstractContextManager[None]:
        """A time in which this rank stands still for a group of that kind, or for copies."""
        return _Waiting(self, kind)

    def waited(self, kind: str, since: Moment) -> None:
        """As ``waiting``, from ``since`` until now."""
        if self.running:
            self._waits.append((self._marks[-1][0], _WAITS[kind], since, self.now()))

    def stop(self) -> dict[str, float]:
        """The step is over: seconds by stretch, without waits, and by kind of wait.

        Together they are the time since ``start``. On an accelerator returns when the device
        has come here.
        """
        end = self.now()
        if isinstance(end, torch.Event):
            end.synchronize()
        parts: dict[str, float] = {}
        moments = [moment for _, moment in self._marks[1:]] + [end]
        for (stretch, begun), ended in zip(self._marks, moments, strict=True):
            parts[stretch] = parts.get(stretch, 0.0) + _seconds(begun, ended)
        for stretch, kind, begun, ended in self._waits:
            seconds = _seconds(begun, ended)
            parts[stretch] -= seconds
            parts[kind] = parts.get(kind, 0.0) + seconds
        self._marks, self._waits = [], []
        return parts

    def now(self) -> Moment:
        """This moment, for ``waited``."""
        if self._device.type == "cpu":
            return self._clock()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event


class _Waiting(AbstractContextManager[None]):
    """Not a generator: a step waits thousands of times."""

    def __init__(self, stopwatch: Stopwatch, kind: str) -> None:
        self._stopwatch, self._kind = stopwatch, kind
        self._since: Moment | None = None

    def __enter__(self) -> None:
        self._since = self._stopwatch.now() if self._stopwatch.running else None

    def __exit__(self, *error: object) -> None:
        if self._since is not None:
            self._stopwatch.waited(self._kind, self._since)


def _seconds(begun: Moment, ended: Moment) -> float:
    if isinstance(begun, torch.Event):
        assert isinstance(ended, torch.Event)
        return begun.elapsed_time(ended) / 1e3
    assert not isinstance(ended, torch.Event)
    return ended - begun
