"""How long the rest of a run takes, from how long its recent steps took."""

from collections import deque
from statistics import fmean


class Pace:
    """The mean of the middle half of the last ``window`` step times.

    A pause of the machine or a first step that compiles moves it little, and a lasting
    change of speed (a longer sequence, a busier machine) takes over within the window.
    Evaluations and checkpoints lie between steps and do not count.
    """

    def __init__(self, window: int = 64) -> None:
        self._seconds: deque[float] = deque(maxlen=window)

    def step(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def remaining(self, steps: int) -> float | None:
        """Seconds for so many further steps; None before the first."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        cut = len(ordered) // 4
        return steps * fmean(ordered[cut : len(ordered) - cut])
