import gzip
import itertools
import json
import sys

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.documents import Defect, Document, Unit, decoded, valid_text
from kimi_pretrain.data.readers import read

TEXTS = ["first", "zweite Zeile\nmit Umbruch", "世界 \U0001f600", "x" * 5000, "last"]


def unit(reader, *paths, **options):
    return Unit(
        reader, tuple(map(str, paths)), sum(path.stat().st_size for path in paths), **options
    )


def texts(items):
    items = list(items)
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def jsonl(values, field="text"):
    return b"".join(json.dumps({"id": 1, field: value}).encode() + b"\n" for value in values)


@pytest.fixture(params=["", ".gz", ".zst"])
def write(request, tmp_path):
    """Write bytes to a file, compressed or not."""

    def writer(name, data):
        path = tmp_path / f"{name}{request.param}"
        if request.param == ".gz":
            data = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
        elif request.param == ".zst":
            # Several frames, as pzstd and `cat` make them: stopping at the first loses text.
            compressor = zstandard.ZstdCompressor()
            data = b"".join(
                compressor.compress(data[first : first + 1000])
                for first in range(0, len(data), 1000)
            )
        path.write_bytes(data)
        return path

    return writer


def test_json_lines(write):
    path = write("a.jsonl", jsonl(TEXTS) + b"\n  \n" + jsonl(["after blank lines"]))
    assert texts(read(unit("jsonl", path))) == [*TEXTS, "after blank lines"]
    path = write("b.jsonl", jsonl(TEXTS, "content"))
    assert texts(read(unit("jsonl", path, text_field="content"))) == TEXTS


def test_whole_files_and_lines(write):
    data = b"eins\r\nzwei\n\ndrei ohne Ende"
    assert texts(read(unit("text", write("a.txt", data)))) == [data.decode()]
    assert texts(read(unit("lines", write("b.txt", data)))) == [
        "eins",
        "zwei",
        "",
        "drei ohne Ende",
    ]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    values = [f"row {index}" for index in range(2500)]
    table = pyarrow.table({"id": range(2500), "text": values})
    parquet.write_table(table, path, row_group_size=1100)
    assert texts(read(unit("parquet", path))) == values
    assert texts(read(unit("parquet", path, start=1, stop=2))) == values[1100:2200]
    parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), path)
    a, missing, c = read(unit("parquet", path))
    assert (a.text, c.text) == ("a", "c")
    assert "row 1 of row group 0" in missing.what


def test_cuts_of_a_line_file_give_every_line_once(tmp_path):
    """A line on a border read twice or by nobody is the classic loss of byte ranges."""
    path = tmp_path / "a.jsonl"
    values = [f"document {index} " + "y" * (index % 7) for index in range(50)]
    path.write_bytes(jsonl(values))
    size = path.stat().st_size
    for cut in range(1, size, 13):
        first = texts(read(unit("jsonl", path, stop=cut)))
        second = texts(read(unit("jsonl", path, start=cut, stop=size)))
        assert first + second == values
    thirds = [0, size // 3, size // 3 + 1, size]
    parts = [
        text
        for start, stop in itertools.pairwise(thirds)
        for text in texts(read(unit("jsonl", path, start=start, stop=stop)))
    ]
    assert parts == values


def test_bad_records_are_told_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "good"}', b'{"text": ', b'["list"]', b'{"txt": "misnamed"}', b'{"text": 5}']
    path.write_bytes(b"\n".join([*lines, b'{"text": "also good"}']))
    items = list(read(unit("jsonl", path)))
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "also good"]
    defects = [str(item.error()) for item in items if isinstance(item, Defect)]
    assert len(defects) == 4
    for number, words in [(2, "JSON object"), (3, "JSON object"), (4, "txt"), (5, "string")]:
        assert f"line {number}" in defects[number - 2]
        assert words in defects[number - 2]
        assert "\n" not in defects[number - 2]


def test_invalid_utf8_is_repaired_and_marked(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9 fine".encode("latin-1"))
    (document,) = read(unit("text", path))
    assert document == Document("caf\ufffd fine", repaired=True)
    path.write_bytes(
        b'{"text": "caf\xe9"}\n{"text": "lone \\ud800 surrogate"}\n{"text": "\\ud83d\\ude00"}'
    )
    items = list(read(unit("jsonl", path)))
    assert items == [
        Document("caf\ufffd", repaired=True),
        Document("lone \ufffd surrogate", repaired=True),
        Document("\U0001f600"),
    ]


def test_byte_order_mark_is_not_text():
    assert decoded(b"\xef\xbb\xbfabc") == Document("abc")
    assert decoded(b"\xef\xbb\xbfab\xff") == Document("ab\ufffd", repaired=True)
    assert valid_text("pair \ud83d\ude00") == Document("pair \U0001f600", repaired=True)


def test_damaged_compression_is_a_defect(write):
    """python-zstandard ends quietly at a cut: text would go missing without a word."""
    path = write("a.jsonl", jsonl([f"{index} " * 300 for index in range(40)]))
    if path.suffix == ".jsonl":
        return
    whole = path.read_bytes()
    for data in (whole[:-20], whole[: len(whole) // 2], whole[:100] + b"!!!!!!!!" + whole[108:]):
        path.write_bytes(data)
        *_, last = read(unit("jsonl", path))
        assert isinstance(last, Defect), len(data)
        assert str(path) in str(last.error())


def test_unreadable_files_are_defects_and_the_next_is_read(tmp_path):
    good = tmp_path / "b.txt"
    good.write_text("good")
    absent = Unit("text", (str(tmp_path / "absent.txt"), str(good)), 0)
    defect, document = read(absent)
    assert "No such file" in defect.rule
    assert document.text == "good"


def test_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match="pip install zstandard"):
        list(read(unit("text", path)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        list(read(unit("parquet", path)))
