import numpy as np

from kimi_pretrain.data.merge import first_occurrences, held_out


def test_first_occurrences_against_a_set():
    """Also for values equal in one half of the hash only."""
    generator = np.random.default_rng(0)
    digests = generator.integers(0, 4, (200, 2)).astype(np.uint64) << np.uint64(60)
    seen: set[tuple[int, int]] = set()
    for row, first in zip(digests.tolist(), first_occurrences(digests).tolist(), strict=True):
        assert first == (tuple(row) not in seen)
        seen.add(tuple(row))
    assert first_occurrences(np.empty((0, 2), dtype=np.uint64)).shape == (0,)


def test_held_out_share_and_nesting():
    """A larger share holds out what a smaller one did, and more."""
    digests = np.random.default_rng(1).integers(0, 2**64, (20_000, 2), dtype=np.uint64)
    small, large = held_out(digests, 0.01), held_out(digests, 0.1)
    assert not held_out(digests, 0.0).any()
    assert abs(small.mean() - 0.01) < 0.003
    assert abs(large.mean() - 0.1) < 0.01
    assert (large | ~small).all()
