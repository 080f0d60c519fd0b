import numpy as np
import pytest

from kimi_pretrain.telemetry.style import medians, smooth


def test_smoothing_does_not_lag() -> None:
    """An exponential average draws a falling loss above the truth."""
    line = np.linspace(9.0, 3.0, 1000)
    np.testing.assert_allclose(smooth(line)[:-20], line[:-20], rtol=1e-12)


def test_smoothing_keeps_the_first_loss() -> None:
    """A fixed window starts the curve far below ln(vocabulary)."""
    falling = 3 + 6 * np.exp(-np.arange(500) / 5)
    assert smooth(falling)[0] == falling[0]


def test_smoothing_ends_without_the_noise_of_the_last_step() -> None:
    flat = np.ones(1000)
    flat[-1] = 2.0
    assert smooth(flat)[-1] == pytest.approx(1 + 1 / 11)


def test_a_nan_is_a_gap_and_spoils_nothing_else() -> None:
    values = np.ones(300)
    values[[10, 150]] = np.nan, np.inf
    smoothed = smooth(values)
    assert np.isnan(smoothed[[10, 150]]).all()
    assert (np.delete(smoothed, [10, 150]) == 1.0).all()


def test_medians_ignore_a_slow_first_step() -> None:
    rate = np.full(400, 100.0)
    rate[0] = 3.0
    middle, median = medians(np.arange(400.0), rate)
    assert (median == 100.0).all()
    assert middle[[0, -1]].tolist() == [1.5, 397.5]
    assert medians(np.arange(3.0), rate[:3]).shape == (2, 3)
