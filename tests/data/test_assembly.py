"""Document numbers and ignored labels, against a look at every token."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.data.assembly import IGNORED, Batch, assemble, plan
from kimi_pretrain.data.indexed import IndexedReader, IndexedWriter
from kimi_pretrain.data.windows import Windows

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(lambda x: [*x, 8])


def windows_of(prefix: Path, lengths: list[int], length: int) -> Windows:
    with IndexedWriter(prefix, 1000) as writer:
        writer.add_documents(np.arange(sum(lengths)), np.array(lengths))
    return Windows(IndexedReader(prefix), length)


@settings(deadline=None, max_examples=60)
@given(documents=st.tuples(LENGTHS, LENGTHS), length=st.integers(1, 7), data=st.data())
def test_any_part_of_any_plan(
    tmp_path_factory: pytest.TempPathFactory,
    documents: tuple[list[int], list[int]],
    length: int,
    data: st.DataObject,
) -> None:
    """Catches boundaries given to a neighbour's sample, or lost where a plan is cut."""
    root = tmp_path_factory.mktemp("a")
    files = [windows_of(root / str(k), d, length) for k, d in enumerate(documents)]
    owners = [np.repeat(np.arange(len(d)), d) for d in documents]
    samples = data.draw(
        st.lists(
            st.integers(0, 1).flatmap(
                lambda k: st.tuples(st.just(k), st.integers(0, files[k].count - 1))
            ),
            max_size=12,
        )
    )
    first = data.draw(st.integers(0, len(samples)))
    last = data.draw(st.integers(first, len(samples)))
    file, window = np.array(samples, dtype=np.int64).reshape(-1, 2).T
    batch = assemble(plan(files, file, window, document_mask=True), first, last, length)
    whole = assemble(plan(files, file, window, document_mask=False), first, last, length)
    assert len(batch) == len(whole) == last - first
    assert whole.document_ids is None
    assert batch.document_ids is not None
    assert np.array_equal(batch.tokens, whole.tokens)
    for row, (k, w) in enumerate(samples[first:last]):
        expected = np.arange(w * length, (w + 1) * length + 1)
        owner = owners[k][expected]
        assert whole.tokens[row].tolist() == expected[:-1].tolist()
        assert whole.labels[row].tolist() == expected[1:].tolist()
        kept = np.where(owner[1:] == owner[:-1], expected[1:], IGNORED)
        assert batch.labels[row].tolist() == kept.tolist()
        numbers = np.unique(owner[:-1], return_inverse=True)[1]
        assert batch.document_ids[row].tolist() == numbers.tolist()


def test_split_is_views() -> None:
    tokens = np.arange(20).reshape(5, 4)
    batch = Batch(tokens, tokens + 1, np.zeros((5, 4), np.int32))
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert all(np.shares_memory(part.tokens, tokens) for part in parts)
    assert np.array_equal(np.concatenate([part.labels for part in parts]), batch.labels)
    assert parts[0].document_ids is not None
    (whole,) = Batch(tokens, tokens, None).split(5)
    assert whole.document_ids is None
