import numpy as np
import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.index_files import merge_files, rebuild_index, write_index
from kimi_pretrain.data.indexed import IndexedReader, IndexedWriter


def write(prefix, documents, vocab_size=1000):
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return prefix


def documents_of(prefix):
    reader = IndexedReader(prefix)
    reader.verify()
    return [reader.doc(index).tolist() for index in range(len(reader))]


def test_merged_documents_follow_each_other(tmp_path):
    one = write(tmp_path / "one", [[1, 2, 0], [3, 0]])
    two = write(tmp_path / "two", [[4, 0]])
    empty = write(tmp_path / "empty", [])
    merge_files([one, empty, two, one], tmp_path / "new" / "all")
    expected = [[1, 2, 0], [3, 0], [4, 0], [1, 2, 0], [3, 0]]
    assert documents_of(tmp_path / "new" / "all") == expected


def test_index_written_here_equals_the_writers(tmp_path):
    prefix = write(tmp_path / "a", [[1, 2, 0], [3, 0], [0]])
    write_index(tmp_path / "b.idx", np.dtype("<u2"), np.array([3, 2, 1]), np.arange(4), None)
    assert (tmp_path / "b.idx").read_bytes() == prefix.with_suffix(".idx").read_bytes()


def test_merging_keeps_sentences_and_modes(tmp_path):
    """Megatron's sentence-split files have several sequences a document."""
    for name, modes in (("a", [0, 1, 0]), ("b", [1, 1, 0])):
        np.arange(6, dtype="<u2").tofile(tmp_path / f"{name}.bin")
        write_index(
            tmp_path / f"{name}.idx",
            np.dtype("<u2"),
            np.array([2, 1, 3]),
            np.array([0, 2, 3]),
            np.array(modes),
        )
    merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert documents_of(tmp_path / "c") == [[0, 1, 2], [3, 4, 5]] * 2
    reader = IndexedReader(tmp_path / "c")
    assert reader.sequences == 6
    assert reader.modes is not None
    assert reader.modes.tolist() == [0, 1, 0, 1, 1, 0]


def test_merging_refuses_what_does_not_fit(tmp_path):
    small = write(tmp_path / "small", [[1]])
    large = write(tmp_path / "large", [[1]], vocab_size=100_000)
    with pytest.raises(ConfigError, match="token type"):
        merge_files([small, large], tmp_path / "out")
    with pytest.raises(ConfigError, match="must not exist yet"):
        merge_files([small, small], large)
    assert not (tmp_path / "out.bin").exists()


def test_lost_index_comes_back(tmp_path):
    prefix = write(tmp_path / "a", [[1, 2, 0], [3, 0], [0], [4] * 100 + [0]])
    index = tmp_path / "a.idx"
    before = index.read_bytes()
    index.unlink()
    assert rebuild_index(prefix, np.dtype("<u2"), 0) == 4
    assert index.read_bytes() == before
    with pytest.raises(ConfigError, match="must not exist yet"):
        rebuild_index(prefix, np.dtype("<u2"), 0)


def test_wrong_facts_about_a_lost_index_are_refused(tmp_path):
    prefix = write(tmp_path / "a", [[1, 2, 0]])
    (tmp_path / "a.idx").unlink()
    with pytest.raises(ConfigError, match="end with token 9"):
        rebuild_index(prefix, np.dtype("<u2"), 9)
    with pytest.raises(ConfigError, match="whole int32"):
        rebuild_index(prefix, np.dtype("<i4"), 0)
    with pytest.raises(ConfigError, match=r"a prefix without \.bin"):
        rebuild_index(tmp_path / "absent", np.dtype("<i4"), 0)
