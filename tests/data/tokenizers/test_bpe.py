import json
import re
import subprocess
import sys

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.tokenizers import bpe
from kimi_pretrain.data.tokenizers.bpe import BpeTokenizer
from kimi_pretrain.data.tokenizers.pattern import K2_PATTERN


def test_training_is_deterministic_whatever_the_threads(stdlib_texts, bpe_file):
    """Merges chosen in a hash map's order would give another corpus on every machine."""
    script = (
        "import json, sys; from kimi_pretrain.data.tokenizers import bpe;"
        "sys.stdout.buffer.write(bpe.train(json.load(sys.stdin), 1024))"
    )
    for threads in ("1", "3"):
        result = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(stdlib_texts).encode(),
            env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            check=True,
        )
        assert result.stdout == bpe_file.read_bytes()


def test_vocabulary_is_as_large_as_asked_and_zero_ends_documents(bpe_file):
    tokenizer = BpeTokenizer(bpe_file)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.eod_id == 0
    assert len({tokenizer.decode_bytes([index]) for index in range(1, 1024)}) == 1023


def test_no_merge_crosses_a_piece_of_k2s_pattern(bpe_file, stdlib_texts):
    """Digits in threes, Han apart from other letters: the split must reach the trainer."""
    tokenizer = BpeTokenizer(bpe_file)
    words = [tokenizer.decode_bytes([index]) for index in range(1, 1024)]
    assert max(len(word) for word in words if word.isdigit()) <= 3
    assert not [word for word in words if re.search(rb"\S \S|\n\S", word)]


def test_split_equals_the_one_tiktoken_makes(bpe_file, small_tiktoken_file, stdlib_texts):
    """Oniguruma and fancy-regex must read the class intersection alike."""
    from kimi_pretrain.data.tokenizers.tiktoken_file import parse_ranks

    ranks = parse_ranks(small_tiktoken_file.read_bytes(), small_tiktoken_file)
    oracle = tiktoken.Encoding(
        "oracle", pat_str=K2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = BpeTokenizer(bpe_file)
    mixed = "Ünïcode世界WORLD's 漢字かな don'T 12345 ÀB\u0301c\r\n\n  \t x ǅ ªº ٣٤٥٦ e\u0301́"
    for text in [*stdlib_texts, mixed]:
        assert [index - 1 for index in tokenizer.encode(text)] == oracle.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("aB1 \n\r\t.,'世\x1c\u2003\u0301"), max_size=40),
    characters=st.integers(1, 12),
)
def test_cutting_long_texts_changes_no_id(bpe_file, text, characters):
    """Encoded whole, a text of a gigabyte takes 140; its pieces must give the same ids."""
    library = Tokenizer.from_file(str(bpe_file))
    pieces = list(bpe.cut_at_lines(text, characters))
    assert "".join(pieces) == text
    ids = [index for piece in pieces for index in library.encode(piece).ids]
    assert ids == library.encode(text).ids


def test_long_texts_are_cut_and_put_together(bpe_file, stdlib_texts, monkeypatch):
    library = Tokenizer.from_file(str(bpe_file))
    expected = [library.encode(text).ids for text in stdlib_texts]
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 5000)
    monkeypatch.setattr(bpe, "GROUP_CHARACTERS", 20_000)
    assert BpeTokenizer(bpe_file).encode_batch(stdlib_texts) == expected


def test_a_foreign_split_is_not_cut(bpe_file, tmp_path, monkeypatch):
    """Another pattern may well match across lines."""

    def foreign(content):
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[^x]+"}

    file = rewritten(bpe_file, tmp_path, foreign)
    library = Tokenizer.from_file(str(file))
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 4)
    text = "one\ntwo\nthree x\nfour"
    assert BpeTokenizer(file).encode(text) == library.encode(text).ids


def test_too_little_text_for_the_vocabulary_is_said(stdlib_texts):
    with pytest.raises(ConfigError, match=r"got 4096; the sample has merges for \d+ tokens only"):
        bpe.train(["a little text"], 4096)
    with pytest.raises(ConfigError, match="257"):
        bpe.train(stdlib_texts, 100)


def rewritten(bpe_file, tmp_path, change):
    content = json.loads(bpe_file.read_bytes())
    change(content)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def test_lossy_or_foreign_files_are_refused(bpe_file, tmp_path):
    def normalise(content):
        content["normalizer"] = {"type": "NFC"}

    def word_level(content):
        content["model"]["type"] = "WordLevel"

    def no_end(content):
        content["added_tokens"] = []
        content["model"]["vocab"]["<|other|>"] = content["model"]["vocab"].pop("<|endoftext|>")

    def byte_missing(content):
        del content["model"]["vocab"]["Ā"]

    for change, words in [
        (normalise, "normaliser"),
        (word_level, "must be BPE and ByteLevel"),
        (no_end, r"endoftext"),
        (byte_missing, "256 bytes"),
    ]:
        with pytest.raises(ConfigError, match=words):
            BpeTokenizer(rewritten(bpe_file, tmp_path, change))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizers library"):
        BpeTokenizer(tmp_path)


def test_truncation_in_a_file_does_not_cut_documents(bpe_file, tmp_path):
    def truncate(content):
        content["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    tokenizer = BpeTokenizer(rewritten(bpe_file, tmp_path, truncate))
    assert tokenizer.decode(tokenizer.encode("one two three four five")).endswith("five")
