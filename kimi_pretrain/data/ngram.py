"""A bigram model of the tokens a run has consumed: the loss a trained model has to beat.

Modified Kneser-Ney, interpolated (Kneser and Ney 1995; Chen and Goodman, "An empirical study
of smoothing techniques for language modeling", 1999, section 3), which that study found the
strongest of the classical estimators. With c the counts of pairs and D(k) the discount of an
entry seen k times:

    p(w | v) = (c(v w) - D(c(v w))) / c(v .)  +  sum_w' D(c(v w')) / c(v .) * q(w)
    q(w)     = (n(. w) - E(n(. w))) / n(. .)  +  sum_w' E(n(. w')) / n(. .) / V

where n(. w) counts the distinct predecessors of w and n(. .) the distinct pairs. After an
unseen v, p is q. No constant is fitted to the text that is judged.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kimi_pretrain.data.assembly import IGNORED, Batch

# Pairs that wait before they are merged into the sorted counts; bounds the memory beside them.
PENDING = 1 << 22

Integers = NDArray[np.int64]


class Bigram:
    """Counts of (token, label) pairs, and the loss they predict.

    Counts are kept sparse, 16 bytes a distinct pair, so that the vocabulary has no say in the
    memory. Memory and time are those of sorting what was seen.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._pairs = np.empty(0, np.int64)  # token * vocab_size + label, sorted, distinct
        self._counts = np.empty(0, np.int64)
        self._pending: list[Integers] = []

    def update(self, batch: Batch) -> None:
        """Count the pairs a training step learned from; ignored labels are left out."""
        self._pending.append(self._keys(batch))
        if sum(map(len, self._pending)) >= PENDING:
            self._merge()

    def loss(self, batches: Iterable[Batch]) -> float:
        """Mean cross entropy of the valid labels, in nats a token; nan without any."""
        predict = _Estimate(*self._merge(), self.vocab_size)
        total, tokens = 0.0, 0
        for batch in batches:
            keys = self._keys(batch)
            total -= float(np.log(predict(keys)).sum())
            tokens += len(keys)
        return total / tokens if tokens else float("nan")

    def probabilities(self, token: int) -> NDArray[np.float64]:
        """Distribution over the next token, float64 [vocab_size]; it adds up to one."""
        keys = token * self.vocab_size + np.arange(self.vocab_size)
        return _Estimate(*self._merge(), self.vocab_size)(keys)

    def _keys(self, batch: Batch) -> Integers:
        valid = batch.labels != IGNORED
        keys: Integers = batch.tokens[valid] * self.vocab_size + batch.labels[valid]
        return keys

    def _merge(self) -> tuple[Integers, Integers]:
        if self._pending:
            new, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending.clear()
            pairs, where = np.unique(np.concatenate((self._pairs, new)), return_inverse=True)
            merged = np.zeros(len(pairs), np.int64)
            merged[where[: len(self._pairs)]] += self._counts
            merged[where[len(self._pairs) :]] += counts
            self._pairs, self._counts = pairs, merged
        return self._pairs, self._counts


class _Estimate:
    """The formulas above over one state of the counts."""

    def __init__(self, pairs: Integers, counts: Integers, vocab_size: int) -> None:
        self.vocab_size, self.pairs = vocab_size, pairs
        before, after = np.divmod(pairs, vocab_size)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        self.kept = counts - discounts
        self.total = np.bincount(before, weights=counts, minlength=vocab_size)  # c(v .)
        self.spread = np.bincount(before, weights=discounts, minlength=vocab_size)
        predecessors = np.bincount(after, minlength=vocab_size)  # n(. w)
        discounts = _discounts(predecessors)[np.minimum(predecessors, 3)]
        uniform = np.full(vocab_size, 1.0 / vocab_size)
        mass = predecessors - discounts + discounts.sum() * uniform
        self.lower = mass / len(pairs) if len(pairs) else uniform

    def __call__(self, keys: Integers) -> NDArray[np.float64]:
        """Probability of each (token, label) key, float64 [n]."""
        token, label = np.divmod(keys, self.vocab_size)
        lower: NDArray[np.float64] = self.lower[label]
        if not len(self.pairs):
            return lower
        at = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        kept = np.where(self.pairs[at] == keys, self.kept[at], 0.0)
        total = self.total[token]
        known = (kept + self.spread[token] * lower) / np.maximum(total, 1.0)
        return np.where(total > 0, known, lower)


def _discounts(counts: Integers) -> NDArray[np.float64]:
    """D(0) = 0, D(1), D(2), D(3 and more): Chen and Goodman's equation 26.

    From the numbers of entries seen 1 to 4 times, one added to each so that none is zero.
    Kept a tenth away from 0 and k: text read several times over has no entry seen once, and
    what was never seen must keep some probability.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6) + 1.0
    y = n[1] / (n[1] + 2 * n[2])
    k = np.array([1.0, 2.0, 3.0])
    estimate = k - (k + 1) * y * n[2:5] / n[1:4]
    return np.concatenate(([0.0], np.clip(estimate, 0.1, k - 0.1)))
