import base64
import hashlib
import sysconfig
from pathlib import Path

import pytest
from splintr import Tokenizer as SplintrTokenizer

from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data.tokenizers import bpe, load_tokenizer
from kimi_pretrain.data.tokenizers.bpe import BpeTokenizer
from kimi_pretrain.data.tokenizers.tiktoken_file import TiktokenFileTokenizer

K2_RANKS = 163_584


@pytest.fixture(scope="session")
def stdlib_texts():
    """About 1 MB of real source text, non-ASCII included."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ["ast", "decimal", "heapq", "inspect", "locale", "statistics", "typing", "tarfile"]
    names += ["html/entities", "encodings/aliases", "encodings/cp1251", "email/message"]
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory, stdlib_texts):
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    file.write_bytes(bpe.train(stdlib_texts, 1024))
    return file


@pytest.fixture(scope="session")
def small_tiktoken_file(tmp_path_factory, bpe_file):
    """A tiktoken file of 1,023 ranks: the BPE's own tokens, in its order of merges."""
    tokenizer = BpeTokenizer(bpe_file)
    lines = [
        base64.b64encode(tokenizer.decode_bytes([index])) + b" %d\n" % (index - 1)
        for index in range(1, tokenizer.vocab_size)
    ]
    file = tmp_path_factory.mktemp("tiktoken") / "tiktoken.model"
    file.write_bytes(b"".join(lines))
    return file


@pytest.fixture(scope="session")
def k2_file(tmp_path_factory):
    """Kimi K2's own vocabulary, rebuilt from a package that embeds it; never committed."""
    source = SplintrTokenizer.from_pretrained("kimi_k2")
    lines = [
        base64.b64encode(source.decode_token_bytes(rank)) + b" %d\n" % rank
        for rank in range(K2_RANKS)
    ]
    data = b"".join(lines)
    digest = hashlib.sha256(data).hexdigest()
    assert digest.startswith("b6c497a7")
    assert digest.endswith("5103")
    file = tmp_path_factory.mktemp("k2") / "tiktoken.model"
    file.write_bytes(data)
    return file


@pytest.fixture(scope="session")
def k2_tokenizer(k2_file):
    return TiktokenFileTokenizer(k2_file)


@pytest.fixture(scope="session")
def tokenizers(bpe_file, small_tiktoken_file):
    """One of every kind, by name."""
    paths = {"bytes": None, "bpe": str(bpe_file), "tiktoken": str(small_tiktoken_file)}
    return {
        kind: load_tokenizer(TokenizerConfig(kind=kind, path=path), Path())
        for kind, path in paths.items()
    }
