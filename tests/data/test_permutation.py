"""A window read twice, or never, is what these tests would catch."""

import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.data.permutation import MAX_SIZE, Permutation

KEYS = st.tuples(st.integers(0, 2**63), st.text(max_size=8), st.integers(0, 1000))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), key=KEYS)
def test_every_position_once(size: int, key: tuple[int, str, int]) -> None:
    """Primes, squares and powers of two included: no size may lose or repeat a window."""
    image = Permutation(size, *key).array(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(1, MAX_SIZE), key=KEYS, data=st.data())
def test_inverse_and_array_agree_with_the_scalar(
    size: int, key: tuple[int, str, int], data: st.DataObject
) -> None:
    """Catches 64-bit overflow: numpy wraps, Python does not."""
    permutation = Permutation(size, *key)
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    images = [permutation(p) for p in positions]
    assert all(0 <= image < size for image in images)
    assert permutation.array(np.array(positions, dtype=np.int64)).tolist() == images
    assert [permutation.inverse(image) for image in images] == positions


def test_known_values() -> None:
    """The order of every run depends on these numbers: changing them breaks every resume."""
    permutation = Permutation(10**9, 0, "code", 0)
    assert [permutation(p) for p in range(4)] == [426799941, 686237516, 184753619, 931331150]


def test_every_order_of_four_is_as_likely() -> None:
    """Catches weak rounds on small domains: 24 orders, 12,000 keys, chi-square with 23 df."""
    orders = [tuple(Permutation(4, k).array(np.arange(4)).tolist()) for k in range(12_000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 500) ** 2 / 500).sum() < 49.7  # 99.9 % quantile


@pytest.mark.parametrize("size", [10**9, 1 << 40, 3**25])
def test_looks_random(size: int) -> None:
    """Uniform over 100 bins, neighbours unrelated, also for a run of low positions."""
    n = 100_000
    image = Permutation(size, 1, "a", 0).array(np.arange(n))
    counts = np.bincount(image // -(-size // 100), minlength=100)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 149.5  # 99 df, 99.9 %
    x = image / size
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(x, np.arange(n))[0, 1]) < 4 / np.sqrt(n)


def test_keys_give_unrelated_orders() -> None:
    """Catches an epoch that repeats the last one, and keys whose parts run together."""
    n = 100_003
    keys = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (0, "a0"), ("0", "a", 0)]
    images = [Permutation(n, *key).array(np.arange(n)) for key in keys]
    for i, left in enumerate(images):
        for right in images[:i]:
            assert (left == right).sum() < 12  # Poisson with mean 1


def test_shape_and_empty() -> None:
    permutation = Permutation(100, 0)
    assert permutation.array(np.zeros((2, 3), dtype=np.int32)).shape == (2, 3)
    assert permutation.array(np.empty(0, dtype=np.int64)).shape == (0,)
    assert permutation.array(np.array(7)).item() == permutation(7)


def test_outside_is_an_error() -> None:
    permutation = Permutation(10, 0)
    for position in (-1, 10):
        with pytest.raises(IndexError):
            permutation(position)
        with pytest.raises(IndexError):
            permutation.inverse(position)
        with pytest.raises(IndexError):
            permutation.array(np.array([position]))
    for size in (0, MAX_SIZE + 1):
        with pytest.raises(ValueError, match="size"):
            Permutation(size, 0)


def test_a_look_up_takes_microseconds_at_any_size() -> None:
    """Catches work that grows with the domain. Loose: 20 us a look-up on a busy machine."""
    for size in (1_000, 10**9, MAX_SIZE):
        permutation = Permutation(size, 0)
        positions = np.arange(1000)
        best = min(timeit.repeat(lambda p=permutation, x=positions: p.array(x), number=1))
        assert best / 1000 < 20e-6
