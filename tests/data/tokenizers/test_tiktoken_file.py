import base64
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from splintr import Tokenizer as SplintrTokenizer

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.documents import Document
from kimi_pretrain.data.readers import read
from kimi_pretrain.data.recipes import RECIPES
from kimi_pretrain.data.tokenizers.tiktoken_file import (
    TiktokenFileTokenizer,
    cut,
    parse_ranks,
)

# As released, written out once more so that a slip in pattern.py cannot hide.
RELEASED_PATTERN = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def upstream_cut(text, max_characters, max_run):
    """The released tokenizer's cutting, character by character."""
    for start in range(0, len(text), max_characters):
        chunk = text[start : start + max_characters]
        piece, run, kind = "", 0, None
        for character in chunk:
            run = run + 1 if character.isspace() == kind else 1
            kind = character.isspace()
            if run > max_run:
                yield piece
                piece, run = "", 1
            piece += character
        yield piece


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\u2003\x1c漢"), max_size=60),
    max_characters=st.integers(1, 40),
    max_run=st.integers(1, 6),
)
def test_cut_equals_upstream(text, max_characters, max_run):
    assert list(cut(text, max_characters, max_run)) == list(
        upstream_cut(text, max_characters, max_run)
    )


def test_cut_at_the_real_limits():
    """A limit off by one, or counted over both kinds of run together, moves a border."""
    for text in ["a" * 25_000, "a" * 25_001, " " * 60_000, "ab " * 200_000, "x" * 900_001]:
        assert list(cut(text)) == list(upstream_cut(text, 400_000, 25_000))


def test_special_ids_of_k2(k2_tokenizer):
    assert k2_tokenizer.vocab_size == 163_840
    assert k2_tokenizer.eod_id == 163_585
    expected = {
        "[BOS]": 163_584,
        "[EOS]": 163_585,
        "<|im_end|>": 163_586,
        "<|im_user|>": 163_587,
        "<|im_assistant|>": 163_588,
        "<|reserved_token_163589|>": 163_589,
        "[EOT]": 163_593,
        "<|im_system|>": 163_594,
        "<|im_middle|>": 163_601,
        "[UNK]": 163_838,
        "[PAD]": 163_839,
    }
    assert expected.items() <= k2_tokenizer.special_tokens.items()
    assert sorted(k2_tokenizer.special_tokens.values()) == list(range(163_584, 163_840))


def oracle_for(file):
    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        "oracle", pat_str=RELEASED_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


MIXED = [
    "",
    "Hello世界WORLD's don'T 12345 αβγあ漢字  x\n\n  y\r\n",
    "def f(x):\n    return x**2  # 平方\n",
    "<|im_end|>[EOS]<|endoftext|>",
    "한국어 텍스트 ไทย हिन्दी עברית العربية \U0001f469\u200d\U0001f4bb",
    "ＡＢＣ１２３ ﬁ ǅ ªº ²³¼ \u00a0\u3000 e\u0301",
    "々〇〻 㐀𠀀 ⺀⿕",
]


def test_ids_equal_tiktoken_and_an_independent_implementation(k2_file, k2_tokenizer, stdlib_texts):
    """The released vocabulary against tiktoken with the pattern of the release, and splintr."""
    oracle = oracle_for(k2_file)
    splintr = SplintrTokenizer.from_pretrained("kimi_k2")
    for text in [*stdlib_texts, *MIXED]:
        ids = k2_tokenizer.encode(text)
        assert ids == oracle.encode_ordinary(text)
        assert ids == list(splintr.encode_ordinary(text))
        assert k2_tokenizer.decode(ids) == text


def compare_on_the_default_corpus(k2_file, k2_tokenizer, is_chosen):
    """Over all documents of the chosen files; returns how many ids were equal."""
    oracle = oracle_for(k2_file)
    splintr = SplintrTokenizer.from_pretrained("kimi_k2")
    compared = 0
    for unit in [u for domain in RECIPES["default"].collect().values() for u in domain.units]:
        for item in read(replace(unit, paths=tuple(filter(is_chosen, unit.paths)))):
            assert isinstance(item, Document)
            if not item.text:
                continue
            ids = k2_tokenizer.encode(item.text)
            expected = [
                index
                for piece in upstream_cut(item.text, 400_000, 25_000)
                for index in oracle.encode_ordinary(piece)
            ]
            assert ids == expected, item.text[:80]
            assert ids == list(splintr.encode_ordinary(item.text)), item.text[:80]
            assert k2_tokenizer.decode_bytes(ids) == item.text.encode()
            compared += len(ids)
    return compared


def test_ids_equal_tiktoken_on_a_tenth_of_the_default_corpus(k2_file, k2_tokenizer):
    """Catches text that no example here is like: the files' names choose it, by hash."""

    def is_chosen(path):
        return zlib.crc32(Path(path).name.encode()) % 10 == 0

    assert compare_on_the_default_corpus(k2_file, k2_tokenizer, is_chosen) > 250_000


@pytest.mark.slow
def test_ids_equal_tiktoken_on_the_whole_default_corpus(k2_file, k2_tokenizer):
    """Catches the documents that the tenth leaves out."""
    assert compare_on_the_default_corpus(k2_file, k2_tokenizer, lambda _: True) > 5_000_000


def test_long_runs_are_encoded_as_upstream(k2_file, k2_tokenizer):
    oracle = oracle_for(k2_file)
    for text in ["ab" * 15_000, " " * 30_000 + "x", "word " * 90_000]:
        expected = [
            index
            for piece in upstream_cut(text, 400_000, 25_000)
            for index in oracle.encode_ordinary(piece)
        ]
        assert k2_tokenizer.encode(text) == expected


def test_small_file_has_its_own_special_ids(small_tiktoken_file):
    tokenizer = TiktokenFileTokenizer(small_tiktoken_file.parent)
    assert tokenizer.vocab_size == 1023 + 256
    assert tokenizer.eod_id == 1024


def test_malformed_lines_are_named(small_tiktoken_file, tmp_path):
    lines = small_tiktoken_file.read_bytes().splitlines()
    file = tmp_path / "broken.model"
    for number, line in [
        (3, b"no base64! 3"),
        (4, b"QQ=="),
        (5, b"QQ== five"),
        (6, base64.b64encode(b"never seen") + b" 7"),
        (7, lines[5].split()[0] + b" 7"),
    ]:
        file.write_bytes(b"\n".join([*lines[:number], line, *lines[number + 1 :]]))
        with pytest.raises(ConfigError, match=rf"line {number + 1}: .*{re.escape('its rank')}"):
            TiktokenFileTokenizer(file)
    with pytest.raises(ConfigError, match="0xff is missing"):
        parse_ranks(b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(255)), file)
