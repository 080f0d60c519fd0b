"""What may stop a run between two steps: numbers that are not finite, and signals."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType


class GuardStop(Exception):
    """A guard refused to update the weights; they are as they were before the step."""


def require_finite(
    step: int,
    loss: float,
    grad_norm: float,
    suspects: Callable[[], Mapping[str, Sequence[str]]],
) -> None:
    """Raise GuardStop before the update when the loss or any gradient is NaN or infinite.

    ``suspects`` says what is not finite, and in which tensors; it is asked only then, on every
    rank, since loss and norm are the same everywhere.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    found = "".join(f"; {what} in {_listed(names)}" for what, names in suspects().items() if names)
    raise GuardStop(
        f"step {step}: loss {loss}, gradient norm {grad_norm}{found}; "
        "a step must be finite; weights are unchanged: try a lower optimizer.lr, or inspect "
        "the data of this step"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


class StopRequest:
    """Set by SIGTERM or SIGINT; the loop looks at it at each step boundary."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the first signal; a SIGINT after it interrupts at once.

        SIGTERM comes several times for one wish: Slurm sends it to every process of a job, and
        those that start ranks pass it on.
        """
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the context SIGTERM and SIGINT ask for a stop at the next step boundary."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, request.handle) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
