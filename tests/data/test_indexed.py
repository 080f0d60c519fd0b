"""The files must be Megatron's, byte for byte, and a broken pair must be told, not read."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.indexed import IndexedReader, IndexedWriter

# Written by megatron-core 0.16.1's IndexedDatasetBuilder (dtype int32): documents of the
# sequences [[7, 163839, 0]], [[1], [2, 3]] and [[5]]; kept so that the test needs no Megatron.
MEGATRON_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 04 0400000000000000 0400000000000000"
    "03000000 01000000 02000000 01000000"
    "0000000000000000 0c00000000000000 1000000000000000 1800000000000000"
    "0000000000000000 0100000000000000 0300000000000000 0400000000000000"
)
MEGATRON_BIN = struct.pack("<7i", 7, 163839, 0, 1, 2, 3, 5)


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 163_840) -> IndexedReader:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return IndexedReader(prefix)


def by_hand(documents: list[list[int]], code: int, letter: str) -> tuple[bytes, bytes]:
    """The pair as the layout's table says, independent of the module's own constants."""
    size = struct.calcsize(letter)
    lengths = [len(d) for d in documents]
    pointers = [size * sum(lengths[:k]) for k in range(len(documents))]
    count = len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", count, count + 1) + struct.pack(f"<{count}i", *lengths)
    index += struct.pack(f"<{count}q", *pointers) + struct.pack(f"<{count + 1}q", *range(count + 1))
    tokens = [t for d in documents for t in d]
    return struct.pack(f"<{len(tokens)}{letter}", *tokens), index


@pytest.mark.parametrize(("vocab", "code", "letter"), [(65_499, 8, "H"), (65_500, 4, "i")])
def test_writes_the_documented_bytes(tmp_path: Path, vocab: int, code: int, letter: str) -> None:
    """Catches a wrong offset, width or byte order, and u16 chosen at the wrong vocabulary."""
    documents = [[5, 1, vocab - 1], [], [2], [3] * 300]
    write(tmp_path / "a", documents, vocab)
    expected = by_hand(documents, code, letter)
    assert (tmp_path / "a.bin").read_bytes() == expected[0]
    assert (tmp_path / "a.idx").read_bytes() == expected[1]


@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]
)
def test_reads_every_integer_type(tmp_path: Path, code: int, letter: str) -> None:
    documents = [[1, 2, 3], [100], [4, 5]]
    data, index = by_hand(documents, code, letter)
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "a.idx").write_bytes(index)
    reader = IndexedReader(tmp_path / "a")
    reader.verify()
    assert [reader.doc(i).tolist() for i in range(3)] == documents
    assert reader.tokens.tolist() == [1, 2, 3, 100, 4, 5]


def test_reads_what_megatron_wrote(tmp_path: Path) -> None:
    """Catches sequences taken for documents: the second document here has two."""
    (tmp_path / "m.idx").write_bytes(MEGATRON_IDX)
    (tmp_path / "m.bin").write_bytes(MEGATRON_BIN)
    reader = IndexedReader(tmp_path / "m")
    reader.verify()
    assert len(reader) == 3
    assert [reader.doc(i).tolist() for i in range(3)] == [[7, 163839, 0], [1, 2, 3], [5]]
    assert reader.document_starts.tolist() == [0, 3, 6]
    assert reader.lengths.tolist() == [3, 3, 1]
    assert reader.document_at(np.arange(7)).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert reader.modes is None


@pytest.mark.slow
def test_agrees_with_an_installed_megatron(tmp_path: Path) -> None:
    """The frozen fixture above, checked again in both directions; make installs Megatron."""
    import torch
    from megatron.core.datasets import indexed_dataset as indexed

    for vocab in (65_499, 65_500):
        documents = [[5, 1, vocab - 1], [2], [3] * 300]
        write(tmp_path / "ours", documents, vocab)
        builder = indexed.IndexedDatasetBuilder(
            str(tmp_path / "theirs.bin"), dtype=indexed.DType.optimal_dtype(vocab)
        )
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        for end in ("bin", "idx"):
            ours, theirs = ((tmp_path / f"{n}.{end}").read_bytes() for n in ("ours", "theirs"))
            assert ours == theirs
        read = indexed.IndexedDataset(str(tmp_path / "ours"))
        assert [read[i].tolist() for i in range(3)] == documents


def test_modes_are_read(tmp_path: Path) -> None:
    """Multimodal files end in one more byte a sequence; their size is not an error."""
    (tmp_path / "m.idx").write_bytes(MEGATRON_IDX + bytes([0, 1, 0, 2]))
    (tmp_path / "m.bin").write_bytes(MEGATRON_BIN)
    reader = IndexedReader(tmp_path / "m")
    assert reader.modes is not None
    assert reader.modes.tolist() == [0, 1, 0, 2]


def test_empty_documents_hold_no_token(tmp_path: Path) -> None:
    """Catches a search that answers with an empty document beside or after the token's own."""
    reader = write(tmp_path / "a", [[], [1, 2], [], [], [3], [], []])
    assert reader.document_at(np.arange(3)).tolist() == [1, 1, 4]
    assert reader.lengths.tolist() == [0, 2, 0, 0, 1, 0, 0]


def test_a_file_without_documents(tmp_path: Path) -> None:
    reader = write(tmp_path / "a", [])
    assert (len(reader), reader.total_tokens, reader.tokens.tolist()) == (0, 0, [])
    reader.verify()


def test_add_documents_equals_one_by_one(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "b", 100) as writer:
        writer.add_documents(np.array([1, 2, 3, 4]), np.array([1, 0, 3]))
    write(tmp_path / "a", [[1], [], [2, 3, 4]], 100)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()


@pytest.mark.parametrize(
    "ids", [np.array([1, 100]), np.array([-1]), np.array([1.0]), np.array([[1]])]
)
def test_wrong_ids_are_refused(tmp_path: Path, ids: np.ndarray) -> None:
    """Catches 65,536 becoming 0 in a u16 file."""
    writer = IndexedWriter(tmp_path / "a", 100)
    with pytest.raises(ValueError, match="ids must"):
        writer.add_document(ids)
    writer.abort()


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    """Catches a killed writer's half file that a later run takes for a domain."""
    writer = IndexedWriter(tmp_path / "a", 100)
    writer.add_document(np.array([1, 2]))
    with pytest.raises(ConfigError):
        IndexedReader(tmp_path / "a")
    writer.finish()
    with pytest.raises(ValueError, match="ids must"), IndexedWriter(tmp_path / "a", 100) as second:
        second.add_documents(np.array([3, 200]), np.array([2]))
    assert IndexedReader(tmp_path / "a").tokens.tolist() == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


BREAKS = {
    "magic": lambda b: b"X" + b[1:],
    "version": lambda b: b[:9] + struct.pack("<Q", 2) + b[17:],
    "float tokens": lambda b: b[:17] + b"\x07" + b[18:],
    "cut off": lambda b: b[:-1],
    "cut in the header": lambda b: b[:20],
    "too many sequences": lambda b: b[:18] + struct.pack("<Q", 1 << 40) + b[26:],
    "no document entry": lambda b: b[:26] + struct.pack("<Q", 0) + b[34:-32],
    "documents end early": lambda b: b[:-8] + struct.pack("<q", 3),
    "tokens missing": lambda b: b[:46] + struct.pack("<i", 2) + b[50:],
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_index_is_one_line(tmp_path: Path, how: str) -> None:
    (tmp_path / "m.idx").write_bytes(BREAKS[how](MEGATRON_IDX))
    (tmp_path / "m.bin").write_bytes(MEGATRON_BIN)
    with pytest.raises(ConfigError) as caught:
        IndexedReader(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert "m." in caught.value.what


@pytest.mark.parametrize("end", ["bin", "idx"])
def test_a_missing_half_names_the_file(tmp_path: Path, end: str) -> None:
    write(tmp_path / "a", [[1]])
    (tmp_path / f"a.{end}").unlink()
    with pytest.raises(ConfigError, match=f"a.{end}"):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize(
    ("at", "value"), [(58, 8), (90, 5)], ids=["a gap between sequences", "documents go back"]
)
def test_verify_looks_at_every_entry(tmp_path: Path, at: int, value: int) -> None:
    """Opening looks at the ends only; windows cut from the flat file would cross the gap."""
    broken = MEGATRON_IDX[:at] + struct.pack("<q", value) + MEGATRON_IDX[at + 8 :]
    (tmp_path / "m.idx").write_bytes(broken)
    (tmp_path / "m.bin").write_bytes(MEGATRON_BIN)
    with pytest.raises(ConfigError):
        IndexedReader(tmp_path / "m").verify()


def test_prefix_with_a_dot(tmp_path: Path) -> None:
    """Catches `with_suffix`, which would turn corpus.v1 into corpus.bin."""
    write(tmp_path / "corpus.v1", [[1]])
    assert (tmp_path / "corpus.v1.bin").is_file()


def test_opening_costs_the_same_at_a_trillion_tokens(tmp_path: Path) -> None:
    """Catches an array loaded on opening: the arrays of these sparse files take 5 GB."""
    sequences, tokens = 1 << 28, 1 << 38
    with (tmp_path / "a.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, sequences, sequences + 1))
        file.seek(34 + 4 * sequences + 8 * (sequences - 1))
        file.write(struct.pack("<q", 4 * tokens))
        file.seek(34 + 12 * sequences + 8 * sequences)
        file.write(struct.pack("<q", sequences))
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(4 * tokens)
    tracemalloc.start()
    reader = IndexedReader(tmp_path / "a")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.total_tokens == tokens
    assert peak < 1 << 20
