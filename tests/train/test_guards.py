"""Guards: numbers that are not finite, and signals."""

import os
import signal

import pytest

from kimi_pretrain.train.guards import GuardStop, require_finite, stop_on_signal


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan"))]
)
def test_a_step_that_is_not_finite_is_refused(loss: float, norm: float) -> None:
    """Catches comparisons that a NaN passes."""
    suspects = {"gradients": list("abcdefghij"), "tiles": ["k"], "others": []}
    said = r"step 7.*; gradients in a, b, c, d, e, f, g, h and 2 more; tiles in k; a step must"
    with pytest.raises(GuardStop, match=said):
        require_finite(7, loss, norm, lambda: suspects)


def test_a_finite_step_passes() -> None:
    require_finite(1, 2.0, 0.0, lambda: pytest.fail("asked for suspects"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_a_sigint_after_it_interrupts(number: signal.Signals) -> None:
    """Catches a handler that swallows every Ctrl-C, one that outlives its context, and a stop
    that a second SIGTERM, which Slurm's own is beside the launcher's, turns into a crash."""
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before
