"""The order of a run depends on its seed and mixture only, whoever reads it and how."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import DataConfig
from kimi_pretrain.config.schema import MixtureStageConfig as Stage
from kimi_pretrain.data.batches import (
    Batch,
    HeldoutStream,
    Prefetcher,
    TrainStream,
    heldout_windows,
)
from kimi_pretrain.data.indexed import IndexedReader, IndexedWriter
from kimi_pretrain.data.prepared import DomainFiles, PreparedData

LENGTH = 8
# Domain k holds the tokens 10,000 k, 10,000 k + 1, ...: a token tells where it came from.
SIZES = {"code": 2005, "math": 1003, "prose": 505}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    root = tmp_path_factory.mktemp("data")
    domains = {}
    rng = np.random.default_rng(0)
    for k, (name, size) in enumerate(SIZES.items()):
        for part, tokens in (("train", size), ("heldout", size // 5)):
            cuts = np.sort(rng.choice(np.arange(1, tokens), tokens // 15, replace=False))
            lengths = np.diff(np.concatenate(([0], cuts, [tokens])))
            with IndexedWriter(root / part / name, 100_000) as writer:
                writer.add_documents(np.arange(tokens) + 10_000 * k, lengths)
        domains[name] = DomainFiles(root / "train" / name, root / "heldout" / name)
    tokenizer: Any = SimpleNamespace(vocab_size=100_000)
    return PreparedData(tokenizer, domains)


def config(mask: bool = True, mixture: list[Stage] | None = None) -> DataConfig:
    return DataConfig(
        name="test",
        root=".",
        mixture=mixture if mixture is not None else MIXTURE,
        sequence_length=LENGTH,
        document_mask=mask,
    )


MIXTURE = [
    Stage({"code": 0.5, "math": 0.3, "prose": 0.2}, 1600),
    Stage({"code": 4, "math": 1, "prose": 3}),
]


def same(left: Batch, right: Batch) -> bool:
    ids = (left.document_ids is None) == (right.document_ids is None)
    if left.document_ids is not None and right.document_ids is not None:
        ids = np.array_equal(left.document_ids, right.document_ids)
    return (
        ids
        and np.array_equal(left.tokens, right.tokens)
        and np.array_equal(left.labels, right.labels)
    )


def joined(batches: list[Batch]) -> Batch:
    ids = [b.document_ids for b in batches if b.document_ids is not None]
    return Batch(
        np.concatenate([b.tokens for b in batches]),
        np.concatenate([b.labels for b in batches]),
        np.concatenate(ids) if ids else None,
    )


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 12])
def test_global_batches_do_not_depend_on_the_readers(prepared: PreparedData, readers: int) -> None:
    """Each reader opens its own stream and reads its part of every global batch."""
    whole = TrainStream(prepared, config(), seed=7)
    streams = [TrainStream(prepared, config(), seed=7) for _ in range(readers)]
    size = 24
    for step in range(12):
        parts = [
            stream.read(step * size + r * (size // readers), size // readers)
            for r, stream in enumerate(streams)
        ]
        assert same(joined(parts), whole.read(step * size, size))


def test_one_integer_resumes(prepared: PreparedData) -> None:
    """Across a stage's and several epochs' ends, one by one as in one piece."""
    stream = TrainStream(prepared, config(), seed=0)
    whole = stream.read(0, 700)
    fresh = TrainStream(prepared, config(), seed=0)
    assert same(joined([fresh.read(i, 1) for i in range(690, 700)]), joined([slice_(whole, 690)]))


def slice_(batch: Batch, first: int) -> Batch:
    assert batch.document_ids is not None
    return Batch(batch.tokens[first:], batch.labels[first:], batch.document_ids[first:])


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    parts=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 290), st.integers(0, 10)),
            st.tuples(st.none(), st.integers(1, 20)),  # goes on where the last one ended
        ),
        min_size=1,
        max_size=12,
    ),
    ahead=st.sampled_from([0, 5, 2048]),
)
def test_looking_ahead_changes_nothing(
    prepared: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    parts: list[tuple[int | None, int]],
    ahead: int,
) -> None:
    """Any order of asking, up to a closed mixture's last sample: catches a stale look-up."""
    closed = [Stage({"code": 2, "math": 1}, 1000), Stage({"prose": 1, "math": 2}, 1400)]
    monkeypatch.setattr("kimi_pretrain.data.batches.AHEAD", ahead)
    stream = TrainStream(prepared, config(mixture=closed), seed=0)
    whole = TrainStream(prepared, config(mixture=closed), seed=0).read(0, 300)
    assert stream.samples == 300
    end = 0
    for first, count in parts:
        first = end if first is None else first
        end = min(first + count, 300)
        assert whole.document_ids is not None
        part = slice(first, end)
        expected = Batch(whole.tokens[part], whole.labels[part], whole.document_ids[part])
        assert same(stream.read(first, end - first), expected)
    with pytest.raises(ConfigError, match="end after 300 samples"):
        stream.read(299, 2)


def test_no_window_twice_before_all_once(prepared: PreparedData) -> None:
    """Over a stage change too: the counts of a domain carry over."""
    stream = TrainStream(prepared, config(), seed=3)
    batch = stream.read(0, 1500)
    domain = batch.tokens[:, 0] // 10_000
    for k, windows in enumerate(stream.windows.values()):
        order = (batch.tokens[domain == k, 0] - 10_000 * k) // LENGTH
        assert len(order) > windows.count  # the test reaches a second epoch
        for first in range(0, len(order), windows.count):
            epoch = order[first : first + windows.count]
            assert len(np.unique(epoch)) == len(epoch)
    expected = {
        n: c / w.count
        for (n, w), c in zip(stream.windows.items(), np.bincount(domain), strict=True)
    }
    assert stream.epochs(1500) == expected


def test_weights_are_kept(prepared: PreparedData) -> None:
    tokens = TrainStream(prepared, config(), seed=0).read(0, 1000).tokens[:, 0] // 10_000
    assert np.bincount(tokens[:200]).tolist() == [100, 60, 40]
    assert np.bincount(tokens[200:]).tolist() == [400, 100, 300]


def test_listing_of_the_domains_decides_nothing(prepared: PreparedData) -> None:
    """Nor does one of weight 0: a resume after sorting a configuration goes on as before."""
    listed = dict(reversed(prepared.domains.items()))
    listed["aside"] = listed["code"]
    turned = TrainStream(PreparedData(prepared.tokenizer, listed), config(), seed=0)
    assert same(turned.read(0, 300), TrainStream(prepared, config(), seed=0).read(0, 300))


def test_seeds_differ(prepared: PreparedData) -> None:
    first, second = (TrainStream(prepared, config(), seed=s).read(0, 64) for s in (0, 1))
    assert not np.array_equal(first.tokens, second.tokens)


def test_without_a_mixture_all_domains_end_together(prepared: PreparedData) -> None:
    stream = TrainStream(prepared, config(mixture=[]), seed=0)
    total = sum(w.count for w in stream.windows.values())
    starts = stream.read(0, total).tokens[:, 0]
    assert len(np.unique(starts)) == total
    assert set(stream.epochs(total).values()) == {1.0}


def test_labels_stop_at_documents(prepared: PreparedData) -> None:
    """A document's last token must not learn the next document's first one, nor be lost
    anywhere else; at a window's end too, where only the extra token tells.
    """
    kept = TrainStream(prepared, config(mask=False), seed=0).read(0, 400)
    cut = TrainStream(prepared, config(mask=True), seed=0).read(0, 400)
    assert np.array_equal(kept.tokens, cut.tokens)
    assert np.array_equal(kept.labels, kept.tokens + 1)
    assert kept.document_ids is None
    assert cut.document_ids is not None
    last = set()
    for k, files in enumerate(prepared.domains.values()):
        reader = IndexedReader(files.train)
        last |= set((reader.document_starts + reader.lengths - 1 + 10_000 * k).tolist())
    ends = np.isin(cut.tokens, list(last))
    assert ends[:, -1].any()
    assert np.array_equal(cut.labels, np.where(ends, -100, kept.labels))
    assert np.array_equal(np.diff(cut.document_ids, axis=1), ends[:, :-1].astype(np.int32))
    assert (cut.document_ids[:, 0] == 0).all()


def test_types_and_layout(prepared: PreparedData) -> None:
    """torch.from_numpy shares these; a non-contiguous or 32-bit array would fail there."""
    batch = TrainStream(prepared, config(), seed=0).read(0, 4)
    assert (batch.tokens.dtype, batch.labels.dtype) == (np.int64, np.int64)
    assert batch.document_ids is not None
    assert batch.document_ids.dtype == np.int32
    for array in (batch.tokens, batch.labels, batch.document_ids):
        assert array.shape == (4, LENGTH)
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert [len(part) for part in batch.split(3)] == [3, 1]
    assert same(joined(list(batch.split(3))), batch)


def test_nothing_asked_nothing_read(prepared: PreparedData) -> None:
    assert len(TrainStream(prepared, config(), seed=0).read(5, 0)) == 0


def test_a_domain_without_a_window_is_one_line(prepared: PreparedData, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "short", 10) as writer:
        writer.add_document(np.arange(8))
    short = PreparedData(prepared.tokenizer, {"short": DomainFiles(tmp_path / "short")})
    with pytest.raises(ConfigError, match=r"8 tokens.*sequence_length \+ 1 = 9"):
        TrainStream(short, config(mixture=[]), seed=0)


def test_heldout_is_the_same_at_every_call(prepared: PreparedData) -> None:
    first, second = (list(heldout_windows(prepared, config(), 30, 4)) for _ in range(2))
    assert [d for d, _ in first] == [d for d, _ in second]
    assert all(same(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    counts = {name: sum(len(b) for d, b in first if d == name) for name in SIZES}
    assert counts == {"code": 10, "math": 10, "prose": 10}
    for k, name in enumerate(SIZES):
        rows = np.concatenate([b.tokens for d, b in first if d == name])
        assert (rows // 10_000 == k).all()
        assert len(np.unique(rows[:, 0])) == len(rows)


def test_heldout_shares_fill_up(prepared: PreparedData) -> None:
    """A domain that is too small leaves its part to the others; more than all is all."""
    stream = HeldoutStream(prepared, config())
    counts = {name: w.count for name, w in stream.windows.items()}
    assert counts == {"code": 50, "math": 24, "prose": 12}
    assert stream.shares(60) == {"code": 24, "math": 24, "prose": 12}
    assert stream.shares(1000) == counts
    assert sum(stream.shares(7).values()) == 7
    none = PreparedData(
        prepared.tokenizer, {n: DomainFiles(f.train) for n, f in prepared.domains.items()}
    )
    assert list(heldout_windows(none, config(), 10, 4)) == []


class Failing:
    """Fails at sample 8."""

    def read(self, first_sample: int, count: int) -> Batch:
        if first_sample >= 8:
            raise OSError("disk")
        return Batch(np.full((count, 1), first_sample), np.zeros((count, 1), np.int64), None)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetching_changes_nothing(prepared: PreparedData) -> None:
    stream = TrainStream(prepared, config(), seed=0)
    with Prefetcher(stream, 4, first_sample=20) as ahead:
        for step in range(10):
            assert same(next(ahead), stream.read(20 + 4 * step, 4))
    with Prefetcher(stream, 4, first_sample=8, stride=12, depth=3) as ahead:
        for step in range(5):
            assert same(next(ahead), stream.read(8 + 12 * step, 4))


def test_prefetcher_ends_with_its_thread(prepared: PreparedData) -> None:
    """Catches a thread that keeps files open, and close() that hangs or fails when repeated."""
    ahead = Prefetcher(TrainStream(prepared, config(), seed=0), 4, 0)
    next(ahead)
    assert threads()
    ahead.close()
    ahead.close()
    assert not threads()
    assert list(ahead) == []


def test_prefetcher_raises_where_reading_failed() -> None:
    """Not earlier, though the thread ran ahead; and not for ever after."""
    ahead = Prefetcher(Failing(), 4, 0, depth=4)
    assert [int(next(ahead).tokens[0, 0]) for _ in range(2)] == [0, 4]
    with pytest.raises(OSError, match="disk"):
        next(ahead)
    assert list(ahead) == []
    assert not threads()
