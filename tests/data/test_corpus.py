import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import DataConfig, DomainConfig, TokenizerConfig
from kimi_pretrain.data import corpus as corpora
from kimi_pretrain.data import recipes
from kimi_pretrain.data.corpus import ensure
from kimi_pretrain.data.indexed import IndexedReader, IndexedWriter
from kimi_pretrain.data.verify import verify


def tiny(root, **options):
    return DataConfig(
        name="tiny",
        root=str(root),
        recipe="stdlib_tiny",
        tokenizer=TokenizerConfig("bytes"),
        **options,
    )


def digest_of(corpus):
    files = sorted(path for path in corpus.rglob("*") if path.is_file())
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    ensure(tiny(root))
    (corpus,) = root.glob("stdlib_tiny-*")
    return corpus


def test_tiny_is_built_once_and_opened_afterwards(tmp_path):
    stages = []
    prepared = ensure(tiny(tmp_path), lambda stage, done, total: stages.append(stage))
    assert "stdlib_tiny corpus: tokenize" in stages
    assert list(prepared.domains) == ["code"]
    files = prepared.domains["code"]
    assert len(IndexedReader(files.train)) + len(IndexedReader(files.heldout)) == 40
    assert len(IndexedReader(files.heldout)) >= 1
    (corpus,) = tmp_path.glob("stdlib_tiny-*")
    assert verify(corpus) == []
    stages.clear()
    again = ensure(tiny(tmp_path), lambda stage, done, total: stages.append(stage))
    assert again.domains == prepared.domains
    assert stages == []
    assert not list(tmp_path.glob(".*.partial"))


def test_equal_input_gives_equal_bytes(tmp_path, tiny_corpus):
    ensure(tiny(tmp_path))
    (corpus,) = tmp_path.glob("stdlib_tiny-*")
    assert corpus.name == tiny_corpus.name
    assert digest_of(corpus) == digest_of(tiny_corpus)


def test_two_processes_at_once_build_one_sound_corpus(tmp_path, tiny_corpus):
    script = (
        "import sys; from kimi_pretrain.data.corpus import ensure;"
        "from kimi_pretrain.config.schema import DataConfig, TokenizerConfig;"
        "ensure(DataConfig(name='t', root=sys.argv[1], recipe='stdlib_tiny',"
        " tokenizer=TokenizerConfig('bytes')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
        for _ in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    (corpus,) = tmp_path.glob("stdlib_tiny-*")
    assert digest_of(corpus) == digest_of(tiny_corpus)
    assert not list(tmp_path.glob(".*.partial"))


def test_killed_build_leaves_nothing_to_open_and_goes_on(tmp_path, tiny_corpus):
    class Killed(BaseException):
        pass

    def kill(stage, done, total):
        if "write" in stage:
            raise Killed

    with pytest.raises(Killed):
        ensure(tiny(tmp_path), kill)
    assert not list(tmp_path.glob("stdlib_tiny-*"))
    ensure(tiny(tmp_path))
    (corpus,) = tmp_path.glob("stdlib_tiny-*")
    assert digest_of(corpus) == digest_of(tiny_corpus)


def test_name_follows_everything_that_decides_the_bytes(tmp_path, monkeypatch, bpe_file):
    recipe = recipes.RECIPES["default"]
    known = [
        corpora.directory_name(recipe, tokenizer, tmp_path)
        for tokenizer in (
            TokenizerConfig("bpe"),
            TokenizerConfig("bpe", vocab_size=1024),
            TokenizerConfig("bytes"),
            TokenizerConfig("bpe", str(bpe_file)),
        )
    ]
    known.append(
        corpora.directory_name(replace(recipe, version=99), TokenizerConfig("bytes"), tmp_path)
    )
    monkeypatch.setattr(recipes.platform, "python_version", lambda: "3.99")
    known.append(corpora.directory_name(recipe, TokenizerConfig("bytes"), tmp_path))
    assert len(set(known)) == len(known)
    same = corpora.directory_name(recipe, TokenizerConfig("bpe", vocab_size=2048), tmp_path)
    monkeypatch.undo()
    assert (
        corpora.directory_name(recipe, TokenizerConfig("bpe", vocab_size=2048), tmp_path)
        == known[0]
    )
    assert same != known[0]


def test_default_recipe_trains_its_tokenizer(tmp_path, monkeypatch):
    """The whole of `default`, on a small part of its input."""
    monkeypatch.setattr(recipes, "CODE_BYTES", 300_000)
    monkeypatch.setattr(recipes, "MATH_BYTES", {"mpmath": 200_000})
    monkeypatch.setattr(recipes, "DOCUMENTED_PACKAGES", {"numpy": ("numpy/linalg", "numpy/fft")})
    monkeypatch.setattr(recipes, "DESCRIBED_PACKAGES", ("numpy", "torch"))
    monkeypatch.setattr(corpora, "prepare", in_this_process(corpora.prepare))
    cfg = DataConfig(
        name="default",
        root=str(tmp_path),
        recipe="default",
        tokenizer=TokenizerConfig("bpe", vocab_size=600),
    )
    prepared = ensure(cfg)
    assert prepared.tokenizer.vocab_size == 600
    assert list(prepared.domains) == ["code", "math", "prose"]
    (corpus,) = tmp_path.glob("default-*")
    assert verify(corpus) == []
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["recipe"]["name"] == "default"
    assert manifest["domains"]["code"]["sources"].popitem()[1]["license"] == "PSF-2.0"
    reader = IndexedReader(prepared.domains["prose"].train)
    assert "numpy.linalg" in "".join(
        prepared.tokenizer.decode(reader.doc(i)) for i in range(len(reader))
    )


def in_this_process(function):
    def call(*arguments, **options):
        return function(*arguments, **options, workers=1)

    return call


def test_default_corpus_as_shipped(tmp_path):
    cfg = DataConfig(
        name="default", root=str(tmp_path), recipe="default", tokenizer=TokenizerConfig("bpe")
    )
    prepared = ensure(cfg)
    (corpus,) = tmp_path.glob("default-*")
    assert verify(corpus) == []
    manifest = json.loads((corpus / "manifest.json").read_text())
    kept = [
        domain[split] for domain in manifest["domains"].values() for split in ("train", "heldout")
    ]
    assert sum(files["bytes"] for files in kept) >= 20e6
    assert all(files["tokens"] > 50_000 for files in kept)
    assert prepared.tokenizer.vocab_size == 2048


def test_unknown_recipe_and_recipe_with_domains(tmp_path):
    with pytest.raises(ConfigError, match=r"got 'defualt'.*try default$"):
        ensure(replace(tiny(tmp_path), recipe="defualt"))
    with pytest.raises(ConfigError, match="brings its own domains"):
        ensure(tiny(tmp_path, domains={"code": DomainConfig("x")}))
    with pytest.raises(ConfigError, match="try bytes"):
        ensure(replace(tiny(tmp_path), tokenizer=TokenizerConfig("byte")))


def test_root_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be writable"):
        ensure(tiny(tmp_path / "file"))


def files_config(root, tokenizer=None, **domains):
    return DataConfig(
        name="files",
        root=str(root),
        tokenizer=tokenizer or TokenizerConfig("bytes"),
        domains={name: DomainConfig(*prefixes) for name, prefixes in domains.items()},
    )


def test_a_user_without_a_home_is_told_to_name_a_root(monkeypatch):
    """Catches a traceback where neither the environment nor the system knows a home."""

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match="KIMI_DATA=DIR"):
        ensure(tiny("~/.cache"))


def test_prepared_files_are_opened_by_prefix(tiny_corpus):
    prepared = ensure(
        files_config(tiny_corpus, code=("train/code", "heldout/code"), more=("train/code",))
    )
    assert list(prepared.domains) == ["code", "more"]
    assert prepared.domains["code"].train == tiny_corpus / "train/code"
    assert prepared.domains["more"].heldout is None
    outside = ensure(files_config("/elsewhere", code=(str(tiny_corpus / "train/code"),)))
    assert outside.domains["code"].train == tiny_corpus / "train/code"


def test_absent_files_name_the_nearest_prefix(tiny_corpus):
    with pytest.raises(ConfigError, match=r"domain 'code'.*train/cod\.bin.*try .*train/code$"):
        ensure(files_config(tiny_corpus, code=("train/cod",)))
    with pytest.raises(ConfigError, match=r"try .*code$"):
        ensure(files_config(tiny_corpus, code=("nowhere/at/all",)))
    with pytest.raises(ConfigError, match=r"data\.recipe=default"):
        ensure(files_config(tiny_corpus))


def test_another_tokenizer_is_refused(tiny_corpus, bpe_file):
    tokenizer = TokenizerConfig("bpe", str(bpe_file))
    with pytest.raises(ConfigError, match=r"were made by bytes.*data\.tokenizer\.kind=bytes"):
        ensure(files_config(tiny_corpus, tokenizer, code=("train/code",)))


def test_kind_without_a_path_means_the_corpus_own_copy(tmp_path, bpe_file):
    from kimi_pretrain.data.documents import Unit
    from kimi_pretrain.data.prepare import DomainInput, Options, prepare

    (tmp_path / "a.txt").write_text("some words")
    units = [Unit("text", (str(tmp_path / "a.txt"),), 10, "s")]
    bpe = TokenizerConfig("bpe", str(bpe_file))
    prepare(tmp_path / "c", {"t": DomainInput(units, {"s": "MIT"})}, bpe, Options(0.0), workers=1)
    prepared = ensure(files_config(tmp_path, TokenizerConfig("bpe"), t=("c/train/t",)))
    reader = IndexedReader(prepared.domains["t"].train)
    assert prepared.tokenizer.decode(reader.doc(0)) == "some words"


def test_megatrons_own_files_need_no_manifest(tmp_path):
    with IndexedWriter(tmp_path / "own", 257) as writer:
        writer.add_document([1, 2, 256])
    prepared = ensure(files_config(tmp_path, code=("own",)))
    assert prepared.domains["code"].train == tmp_path / "own"


def test_moved_corpus_still_opens(tmp_path, tiny_corpus):
    """Paths in a manifest are relative: a corpus is copied to a cluster as it is."""
    shutil.copytree(tiny_corpus, tmp_path / "moved")
    assert verify(tmp_path / "moved") == []
    ensure(files_config(tmp_path / "moved", code=("train/code",)))


def test_a_script_without_a_main_guard_fails_instead_of_waiting(tmp_path: Path) -> None:
    """Catches a worker that imports the script again and waits for its own parent's lock."""
    script = tmp_path / "script.py"
    script.write_text(
        "from kimi_pretrain.config import compose\n"
        "from kimi_pretrain.data.corpus import ensure\n"
        "ensure(compose(['data=default', 'data.tokenizer.kind=bytes']).data)\n"
    )
    environment = os.environ | {"KIMI_DATA": str(tmp_path / "data")}
    ended = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    assert "__main__" in ended.stderr
