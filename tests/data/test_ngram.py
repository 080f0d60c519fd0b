"""A baseline that is too weak would flatter every model held against it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.data import ngram
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.data.ngram import Bigram


def batch(ids: list[int] | np.ndarray) -> Batch:
    ids = np.asarray(ids, dtype=np.int64)
    return Batch(ids[None, :-1], ids[None, 1:], None)


def chain(rng: np.random.Generator, transition: np.ndarray, length: int) -> np.ndarray:
    cumulative, ids = transition.cumsum(axis=1), [0]
    for u in rng.random(length):
        ids.append(min(int(np.searchsorted(cumulative[ids[-1]], u)), len(transition) - 1))
    return np.array(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 4))
def test_probabilities_add_up_and_none_is_zero(ids: list[int], repeats: int) -> None:
    """Also after unseen tokens, after nothing at all, and for text read several times."""
    model = Bigram(7)
    for _ in range(repeats):
        model.update(batch([0, *ids]))
    for token in range(7):
        p = model.probabilities(token)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_formula_by_hand() -> None:
    """Against the equations written out over dense tables, in loops."""
    rng = np.random.default_rng(0)
    vocab = 12
    ids = chain(rng, rng.dirichlet(np.full(vocab, 0.2), vocab), 150)
    model = Bigram(vocab)
    model.update(batch(ids))
    counts = np.zeros((vocab, vocab))
    for v, w in itertools.pairwise(ids):
        counts[v, w] += 1

    def discount(table: np.ndarray) -> list[float]:
        n = [1 + float((table == k).sum()) for k in range(5)]
        y = n[1] / (n[1] + 2 * n[2])
        raw = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return [0.0, *(min(max(d, 0.1), k - 0.1) for k, d in enumerate(raw, 1))]

    d, n = discount(counts), (counts > 0).sum(axis=0)
    e = discount(n)
    left = sum(e[min(int(k), 3)] for k in n)
    q = [(n[w] - e[min(int(n[w]), 3)] + left / vocab) / n.sum() for w in range(vocab)]
    for v in range(vocab):
        total = counts[v].sum()
        spread = sum(d[min(int(c), 3)] for c in counts[v])
        expected = [
            (c - d[min(int(c), 3)] + spread * q[w]) / total if total else q[w]
            for w, c in enumerate(counts[v])
        ]
        assert model.probabilities(v) == pytest.approx(expected, rel=1e-12)
    held = chain(rng, np.full((vocab, vocab), 1 / vocab), 50)
    rows = np.array([model.probabilities(v) for v in range(vocab)])
    expected_loss = -np.log(rows[held[:-1], held[1:]]).mean()
    assert model.loss([batch(held)]) == pytest.approx(expected_loss, rel=1e-12)


def test_reaches_the_entropy_of_a_bigram_source() -> None:
    """With enough text the loss is the source's own entropy rate, and no estimator is below."""
    rng = np.random.default_rng(1)
    transition = rng.dirichlet(np.full(20, 0.3), 20)
    stationary = np.linalg.matrix_power(transition, 200)[0]
    entropy = -(stationary[:, None] * transition * np.log(transition + 1e-300)).sum()
    model = Bigram(20)
    model.update(batch(chain(rng, transition, 100_000)))
    assert model.loss([batch(chain(rng, transition, 40_000))]) == pytest.approx(entropy, abs=0.02)


def test_beats_simpler_estimators_on_sparse_text() -> None:
    """Catches a straw man: words drawn by Zipf's law, most pairs unseen, as in a short run."""
    rng = np.random.default_rng(2)
    vocab = 500
    zipf = 1 / np.arange(1, vocab + 1)
    transition = rng.dirichlet(20 * zipf / zipf.sum(), vocab)
    train, held = chain(rng, transition, 20_000), chain(rng, transition, 5_000)
    model = Bigram(vocab)
    model.update(batch(train))
    loss = model.loss([batch(held)])
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    unigram = (pairs.sum(axis=0) + 1) / (pairs.sum() + vocab)
    conditional = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    after, before = held[1:], held[:-1]
    add_one = (pairs + 1) / (pairs.sum(axis=1, keepdims=True) + vocab)
    assert loss < -np.log(add_one[before, after]).mean()
    for weight in (0.1, 0.3, 0.5, 0.7, 0.9):  # Jelinek-Mercer, the best of them chosen afterwards
        mixed = weight * conditional[before, after] + (1 - weight) * unigram[after]
        assert loss < -np.log(mixed).mean()


def test_ignored_labels_neither_count_nor_cost() -> None:
    """Catches pairs across documents, which the trained model is not asked for either."""
    tokens = np.array([[0, 1, 2, 3]])
    labels = np.array([[1, -100, 3, -100]])
    cut, whole = Bigram(5), Bigram(5)
    cut.update(Batch(tokens, labels, None))
    whole.update(Batch(tokens[:, ::2], labels[:, ::2], None))
    assert np.array_equal(cut.probabilities(0), whole.probabilities(0))
    held = Batch(np.array([[0, 1]]), np.array([[1, -100]]), None)
    assert cut.loss([held]) == pytest.approx(-np.log(cut.probabilities(0)[1]))
    assert np.isnan(cut.loss([]))


def test_order_and_size_of_updates_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches counts lost where pending pairs are merged."""
    rng = np.random.default_rng(3)
    parts = [rng.integers(0, 30, 50) for _ in range(20)]
    whole = Bigram(30)
    for part in parts:
        whole.update(batch(part))
    monkeypatch.setattr(ngram, "PENDING", 64)
    pieces = Bigram(30)
    for part in reversed(parts):
        pieces.update(batch(part))
    for token in range(30):
        assert np.array_equal(whole.probabilities(token), pieces.probabilities(token))


def test_large_vocabularies_take_no_table() -> None:
    """163,840 squared is 27 billion pairs."""
    model = Bigram(163_840)
    model.update(batch([163_839, 163_838, 163_839, 5]))
    assert np.isfinite(model.loss([batch([163_839, 163_838, 17])]))
