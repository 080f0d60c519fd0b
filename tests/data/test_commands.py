import gzip
import json

import pytest

from kimi_pretrain.data.commands import main
from kimi_pretrain.data.indexed import IndexedReader
from kimi_pretrain.data.manifest import read
from kimi_pretrain.data.tokenizers.bytes import ByteTokenizer


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def books(tmp_path):
    """Two shards of JSON lines and a source tree."""
    folder = tmp_path / "books"
    folder.mkdir()
    lines = [json.dumps({"content": f"book {index} of many"}) for index in range(40)]
    (folder / "a.jsonl").write_text("\n".join(lines[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:]).encode()))
    (folder / "notes.md").write_text("# A note")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    return folder


def test_prepare_verify_stats_index(tmp_path, books, capsys):
    corpus = tmp_path / "corpus"
    code, out, err = run(
        capsys,
        *("prepare", books, "-o", corpus, "--domain", "books", "--tokenizer", "bytes"),
        *("--text-field", "content", "--heldout", "0", "--license", "CC0-1.0", "--workers", "1"),
        *("--source", "a shelf"),
    )
    assert code == 0, err
    assert "tokenize: 100%" in err
    assert "a shelf" in out
    record = read(corpus).domains["books"]
    assert record.train.documents == 41
    assert record.input.ignored_files == 1
    assert record.sources["a shelf"].license == "CC0-1.0"
    reader = IndexedReader(corpus / "train/books")
    assert ByteTokenizer().decode(reader.doc(40)) == "# A note"

    code, out, err = run(capsys, "verify", corpus)
    assert (code, "no defect" in out) == (0, True), err
    code, out, _ = run(capsys, "stats", tmp_path)
    assert code == 0
    assert "books" in out
    code, out, _ = run(capsys, "index", corpus / "train/books.idx")
    assert code == 0
    assert "uint16" in out

    code, out, err = run(
        capsys,
        "index",
        "--merge",
        corpus / "train/books",
        corpus / "train/books",
        "-o",
        tmp_path / "m",
    )
    assert code == 0, err
    assert len(IndexedReader(tmp_path / "m")) == 82
    (tmp_path / "m.idx").unlink()
    code, _, err = run(capsys, "index", "--rebuild", tmp_path / "m", "--eod", 256)
    assert code == 0, err
    assert len(IndexedReader(tmp_path / "m")) == 82


def test_bpe_is_trained_on_the_input_once(tmp_path, books, capsys):
    common = ("prepare", "-o", tmp_path / "c", "--tokenizer", "bpe", "--text-field", "content")
    code, _, err = run(capsys, *common, books, "--vocab-size", "270", "--workers", "1")
    assert code == 0, err
    file = tmp_path / "c/tokenizer/tokenizer.json"
    before = file.read_bytes()
    code, _, err = run(capsys, *common, books / "notes.md", "--domain", "notes", "--workers", "1")
    assert code == 0, err
    assert file.read_bytes() == before
    assert list(read(tmp_path / "c").domains) == ["notes", "text"]
    code, _, err = run(capsys, *common, books, "--vocab-size", "300")
    assert code == 2
    assert "has 270 ids" in err
    copied = ("prepare", books / "notes.md", "-o", tmp_path / "d", "--workers", "1")
    code, _, err = run(capsys, *copied, "--tokenizer", f"bpe:{file}")
    assert code == 0, err
    assert (tmp_path / "d/tokenizer/tokenizer.json").read_bytes() == before


def test_tiktoken_file_by_path(tmp_path, books, small_tiktoken_file, capsys):
    code, out, err = run(
        capsys,
        *("prepare", books / "notes.md", "-o", tmp_path / "c", "--workers", "1"),
        *("--tokenizer", f"tiktoken:{small_tiktoken_file}"),
    )
    assert code == 0, err
    assert "tiktoken, 1,279 ids" in out
    assert "notes.md" in read(tmp_path / "c").domains["text"].sources
    assert str(tmp_path) not in (tmp_path / "c/manifest.json").read_text()
    assert run(capsys, "verify", tmp_path / "c")[0] == 0


def test_every_defect_of_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"body": "x"}\nbroken\n{"text": 3}\n')
    command = ("prepare", tmp_path / "a.jsonl", "-o", tmp_path / "c", "--tokenizer", "bytes")
    code, out, err = run(capsys, *command, "--workers", "1")
    assert code == 2
    told = [line for line in err.splitlines() if "line " in line]
    assert [line.split("line ")[1][0] for line in told] == ["2", "3", "4"]
    assert "3 defects" in err
    assert "Traceback" not in err
    assert not out
    code, out, _ = run(capsys, *command, "--workers", "1", "--bad-input", "skip")
    assert code == 0
    assert "3 bad records skipped" in out


def test_defects_of_files_end_with_two(tmp_path, books, capsys):
    corpus = tmp_path / "c"
    run(capsys, "prepare", books / "notes.md", "-o", corpus, "--tokenizer", "bytes", "--heldout", 0)
    path = corpus / "train/text.bin"
    path.write_bytes(b"\x01\x00" + path.read_bytes()[2:])
    code, out, err = run(capsys, "verify", corpus)
    assert code == 2
    assert "SHA-256" in err
    assert "no defect" not in out
    path.write_bytes(b"")
    assert run(capsys, "index", corpus / "train/text")[0] == 2
    assert run(capsys, "stats", tmp_path / "absent")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "-o", "c"], "at least one file"),
        (["prepare", "absent.txt", "-o", "c"], "absent.txt"),
        (["prepare", ".", "-o", "c", "--domain", "a/b"], "letters, digits"),
        (["prepare", ".", "-o", "c"], "no file whose suffix is known"),
        (["prepare", "-o", "c", "--recipe", "defalt"], "try default"),
        (["prepare", ".", "-o", "c", "--recipe", "default"], "finds its own input"),
        (["prepare", ".", "-o", "c", "--tokenizer", "tiktoken"], "reads a file"),
        (["prepare", ".", "-o", "c", "--tokenizer", "bytes:x"], "read no file"),
        (["prepare", ".", "-o", "c", "--tokenizer", "bite"], "try bytes"),
        (["prepare", ".", "-o", "c", "--tokenizer", "bytes", "--vocab-size", "9"], "trained here"),
        (["prepare", ".", "-o", "c", "--heldout", "2"], "[0, 1)"),
        (["prepare", ".", "-o", "c", "--workers", "0"], "at least 1"),
        (["index", "--merge", "a", "b"], "-o PREFIX"),
        (["index", "--rebuild", "a"], "--eod"),
        (["index", "absent"], "absent.idx"),
        ([], "prepare|verify|stats|index"),
        (["prepair"], "prepair"),
    ],
)
def test_mistakes_are_told_with_exit_code_two(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_help_ends_with_zero(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "verify" in out


def test_recipe_from_the_command_line(tmp_path, capsys):
    code, out, err = run(
        capsys, "prepare", "--recipe", "stdlib_tiny", "-o", tmp_path, "--tokenizer", "bytes"
    )
    assert code == 0, err
    assert "PSF-2.0" in out
    assert run(capsys, "stats", tmp_path)[1].strip() == out.strip()
