import os

import pyarrow
import pytest
from pyarrow import parquet

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.documents import Document, Unit
from kimi_pretrain.data.readers import read
from kimi_pretrain.data.sources import (
    LARGEST_UNIT,
    SMALLEST_UNIT,
    format_of,
    grouped,
    plan,
    unit_bytes,
    walk,
)


def texts(units):
    return [item.text for unit in units for item in read(unit) if isinstance(item, Document)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSONL.gz", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.b.txt", "text"),
        ("main.py", "text"),
        ("a.json", None),
        ("a.bin", None),
        ("Makefile", None),
        ("a.gz", None),
    ],
)
def test_format_by_suffix(tmp_path, name, expected):
    assert format_of(tmp_path / name) == expected


def test_directory_in_order_without_hidden_files_and_links(tmp_path):
    for name in ["b/2.py", "a.txt", "b/1.py", "c.bin", ".hidden/x.py", "b/__pycache__/y.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    units, ignored = plan([tmp_path])
    assert texts(units) == ["a.txt", "b/1.py", "b/2.py"]
    assert ignored == 1


def test_large_line_files_are_cut_and_nothing_is_lost(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [f'{{"text": "{index} {"z" * 1000}"}}\n' for index in range(3000)]
    path.write_text("".join(lines))
    units, _ = plan([path])
    assert len(units) == -(-path.stat().st_size // SMALLEST_UNIT)
    assert [text.split()[0] for text in texts(units)] == [str(index) for index in range(3000)]
    assert sum(unit.size for unit in units) == path.stat().st_size


def test_parquet_is_cut_by_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    values = [f"{index} " + os.urandom(500).hex() for index in range(4000)]
    parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=300)
    units, _ = plan([path])
    assert len(units) > 2
    assert texts(units) == values
    with pytest.raises(ConfigError, match=r"got 'txt'.*--text-field text"):
        plan([path], text_field="txt")


def test_damaged_parquet_is_left_to_its_reader(tmp_path):
    """Refused while planning, it would hide the other defects and could not be skipped."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    units, _ = plan([path])
    (defect,) = read(units[0])
    assert str(path) in defect.value


def test_compressed_files_are_not_cut(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"x" * (2 * SMALLEST_UNIT))
    units, _ = plan([path])
    assert [(unit.start, unit.stop) for unit in units] == [(0, None)]


def test_small_neighbours_share_a_unit_in_order():
    small = [Unit("text", (f"{index}",), 10) for index in range(5)]
    other = Unit("jsonl", ("j",), 10)
    sourced = Unit("text", ("s",), 10, source="elsewhere")
    units = list(grouped([*small, other, small[0], sourced], 30))
    assert [unit.paths for unit in units] == [
        ("0", "1", "2"),
        ("3", "4"),
        ("j",),
        ("0",),
        ("s",),
    ]
    assert units[0].size == 30


def test_unit_size_depends_on_the_input_alone():
    assert unit_bytes(0) == SMALLEST_UNIT
    assert unit_bytes(1 << 40) == LARGEST_UNIT
    assert unit_bytes(640 << 20) == 10 << 20


def test_paths_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "books.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"book\.jsonl.*try .*books\.jsonl"):
        plan([tmp_path / "book.jsonl"])
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ConfigError, match="--format text or lines or jsonl"):
        plan([tmp_path / "data.json"])
    assert plan([tmp_path / "data.json"], format="jsonl")[0][0].reader == "jsonl"


def test_unlistable_directory_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        list(walk(tmp_path))
