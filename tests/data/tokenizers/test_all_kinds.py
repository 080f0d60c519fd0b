"""What must hold for every kind of tokenizer."""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data.tokenizer_protocol import Tokenizer
from kimi_pretrain.data.tokenizers import KINDS, load_tokenizer


@cache
def scripts() -> dict[str, list[str]]:
    """Characters by the first word of their Unicode name: LATIN, HAN (CJK), LINEAR, EMOJI..."""
    groups: dict[str, list[str]] = {}
    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        if name:
            groups.setdefault(name.split()[0], []).append(chr(code))
    return groups


def any_script() -> st.SearchStrategy[str]:
    words = st.sampled_from(sorted(scripts())).flatmap(
        lambda script: st.text(st.sampled_from(scripts()[script]), max_size=12)
    )
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    glue = st.sampled_from(["", " ", "\n", "\r\n", "\t ", "'s", "'LL", "123456", "<|endoftext|>"])
    return st.lists(st.one_of(words, anything, glue), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=any_script())
def test_round_trip_loses_nothing_in_any_script(tokenizers, text):
    for kind, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, kind
        assert tokenizer.decode_bytes(ids) == text.encode(), kind
        assert all(0 <= index < tokenizer.vocab_size for index in ids), kind
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()), kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_point_survives(tokenizers, kind):
    """A byte left out of an alphabet shows only on the characters that need it."""
    tokenizer = tokenizers[kind]
    texts = [
        "".join(map(chr, range(first, first + 0x800)))
        for first in range(0, 0x110000, 0x800)
        if not 0xD800 <= first < 0xE000 and (first < 0x20000 or first % 0x8000 == 0)
    ]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_special_names_in_a_text_are_text(tokenizers, kind):
    """A web page that writes <|endoftext|> must not end the document."""
    tokenizer = tokenizers[kind]
    for name in ["<|endoftext|>", "[EOS]", "[BOS]", "<|im_end|>", "<|im_middle|>", "[PAD]"]:
        ids = tokenizer.encode(f"a{name}b")
        assert tokenizer.eod_id not in ids
        assert tokenizer.byte_lengths()[ids].min() > 0
        assert tokenizer.decode(ids) == f"a{name}b"


@pytest.mark.parametrize("kind", KINDS)
def test_protocol_and_byte_lengths(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert isinstance(tokenizer, Tokenizer)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    assert lengths[tokenizer.eod_id] == 0
    assert tokenizer.decode_bytes([tokenizer.eod_id]) == b""
    for index in [0, 5, 200, 255, tokenizer.vocab_size - 1]:
        assert len(tokenizer.decode_bytes([index])) == lengths[index]
    lengths[:] = 0
    assert tokenizer.byte_lengths().any(), "a caller must not be able to change the table"


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_one_by_one(tokenizers, kind):
    texts = ["", "one", "two\n\nthree", "世界 hello", " " * 50]
    assert tokenizers[kind].encode_batch(texts) == [tokenizers[kind].encode(t) for t in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_arrays_and_broken_utf8(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = np.array(tokenizer.encode("é"), dtype=np.int32)
    assert tokenizer.decode(ids) == "é"
    first = tokenizer.encode("\U0001f600")[:1]
    if tokenizer.byte_lengths()[first[0]] < 4:
        assert "\ufffd" in tokenizer.decode(first)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.decode([wrong])


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogate_is_refused(tokenizers, kind):
    """Tiktoken and tokenizers replace or misreport it; no UTF-8 text holds one."""
    with pytest.raises(UnicodeEncodeError):
        tokenizers[kind].encode("a\ud800b")
    with pytest.raises(UnicodeEncodeError):
        tokenizers[kind].encode_batch(["fine", "a\ud800b"])


def test_fingerprints_differ_by_kind_and_repeat(tokenizers, bpe_file):
    prints = {kind: tokenizer.fingerprint() for kind, tokenizer in tokenizers.items()}
    assert len(set(prints.values())) == len(prints)
    again = load_tokenizer(TokenizerConfig(kind="bpe", path=bpe_file.name), bpe_file.parent)
    assert again.fingerprint() == prints["bpe"]


def test_unknown_kind_names_the_closest():
    with pytest.raises(ConfigError, match=r"got 'tiktokn'.*try tiktoken$"):
        load_tokenizer(TokenizerConfig(kind="tiktokn"), Path())


@pytest.mark.parametrize("kind", ["bpe", "tiktoken"])
def test_file_kinds_say_what_is_missing(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path"):
        load_tokenizer(TokenizerConfig(kind=kind), tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        load_tokenizer(TokenizerConfig(kind=kind, path="absent"), tmp_path)
