"""Counts in closed form must be what counting gives, and never leave the asked weights."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import MixtureStageConfig as Stage
from kimi_pretrain.data.mixture import MAX_PERIOD, Mixture, pattern, shares

NAMES = ["a", "b", "c"]
WEIGHT = st.one_of(st.integers(0, 20), st.sampled_from([0.001, 0.3, 0.25, 0.05]))


def positive(weights: list[float]) -> list[float]:
    return [*weights[:-1], weights[-1] + 1]


@settings(deadline=None)
@given(st.lists(WEIGHT, min_size=1, max_size=9).map(positive))
def test_no_domain_is_ever_a_sample_off(weights: list[float]) -> None:
    """After every number of samples each count is within Tijdeman's bound of weight x samples."""
    part = shares(weights)
    total, active = sum(part), sum(1 for s in part if s)
    order = pattern(part)
    counts = np.cumsum(order[:, None] == np.arange(len(part)), axis=0)
    assert counts[-1].tolist() == part
    # In integers: |count - n * share / total| <= 1 - 1 / (2K - 2).
    off = np.abs(counts * total - np.outer(np.arange(1, total + 1), part)).max()
    assert Fraction(int(off), total) <= (1 - Fraction(1, 2 * active - 2) if active > 1 else 0)


def test_decimals_are_taken_as_written() -> None:
    """Catches 0.1 read as 0.1000000000000000055..., which has no short period."""
    assert shares([0.55, 0.25, 0.2]) == [11, 5, 4]
    assert shares([0.7, 0.2999, 0.0001]) == [7000, 2999, 1]
    assert shares([3, 0, 6]) == [1, 0, 2]


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=40),
)
def test_other_weights_round_to_the_longest_period(weights: list[float]) -> None:
    """No positive weight vanishes, and none is off by more than the smallest step allows."""
    part = shares(weights)
    assert min(part) >= 1
    assert sum(part) <= MAX_PERIOD
    exact = np.array(weights) / np.sum(weights)
    assert np.abs(np.array(part) / sum(part) - exact).max() <= len(weights) / MAX_PERIOD


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(WEIGHT, min_size=3, max_size=3).map(positive), st.integers(1, 900)),
        min_size=1,
        max_size=4,
    )
)
def test_numbers_equal_counting(stages: list[tuple[list[float], int]]) -> None:
    """Walks a run of several stages by hand: catches a count that starts anew in a stage."""
    length = 7
    configured = [Stage(dict(zip(NAMES, w, strict=True)), tokens) for w, tokens in stages]
    mixture = Mixture(NAMES, configured, length)
    assert mixture.samples == -(-sum(t for _, t in stages) // length)
    domain, ordinal = mixture.locate(np.arange(mixture.samples))
    seen = np.zeros(3, dtype=np.int64)
    for sample in range(mixture.samples):
        assert mixture.counts(sample).tolist() == seen.tolist()
        assert ordinal[sample] == seen[domain[sample]]
        seen[domain[sample]] += 1
    assert mixture.counts(mixture.samples).tolist() == seen.tolist()


def test_any_order_of_asking() -> None:
    """Catches state: samples asked for backwards, in pieces or alone are the same samples."""
    mixture = Mixture(NAMES, [Stage({"a": 0.5, "b": 0.3, "c": 0.2}, 1000), Stage({"c": 1})], 8)
    domain, ordinal = mixture.locate(np.arange(300))
    back = mixture.locate(np.arange(300)[::-1])
    assert np.array_equal(back[0][::-1], domain)
    assert np.array_equal(back[1][::-1], ordinal)
    for sample in (0, 124, 125, 126, 299):
        one = mixture.locate(np.array([sample]))
        assert (one[0][0], one[1][0]) == (domain[sample], ordinal[sample])


def test_far_samples_need_no_walk() -> None:
    """15.5T tokens: a look-up near the end answers at once and in exact integers."""
    mixture = Mixture(NAMES, [Stage({"a": 0.7, "b": 0.2, "c": 0.1})], 4096)
    sample = 10 * (1 << 50)
    assert mixture.counts(sample).tolist() == [7 << 50, 2 << 50, 1 << 50]
    domain, ordinal = mixture.locate(np.arange(sample, sample + 10))
    assert np.bincount(domain).tolist() == [7, 2, 1]
    assert ordinal.min() >= 1 << 50


@pytest.mark.parametrize(
    ("stages", "what", "near"),
    [
        ([], "data.mixture", "tokens"),
        ([Stage({"a": 1}), Stage({"b": 1})], "data.mixture[0].tokens", "number"),
        ([Stage({"a": 1}, 0)], "data.mixture[0].tokens", "null"),
        ([Stage({"a": -1.0})], "data.mixture[0].weights", "a: 1.0"),
        ([Stage({"a": float("nan")})], "data.mixture[0].weights", "a: 1.0"),
        ([Stage({})], "data.mixture[0].weights", "a: 1.0"),
    ],
)
def test_unusable_stages_are_one_line(stages: list[Stage], what: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Mixture(NAMES, stages, 8)
    assert caught.value.what == what
    assert near in caught.value.fix


def test_a_misspelt_domain_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="try code"):
        Mixture(["code", "math"], [Stage({"cod": 1.0})], 8)


def test_past_the_end_is_an_error() -> None:
    """Catches a run that silently goes on with some weights when its mixture is over."""
    mixture = Mixture(NAMES, [Stage({"a": 1}, 80)], 8)
    assert mixture.samples == 10
    with pytest.raises(ConfigError, match="end after 10 samples"):
        mixture.locate(np.array([10]))
    with pytest.raises(ValueError, match="from 0"):
        mixture.locate(np.array([-1]))
