import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data import manifest as manifests
from kimi_pretrain.data.indexed import IndexedReader
from kimi_pretrain.data.lock import exclusive
from kimi_pretrain.data.prepare import WORK, BadInputError, DomainInput, Options, prepare
from kimi_pretrain.data.sources import plan
from kimi_pretrain.data.tokenizers.bytes import ByteTokenizer

BYTES = TokenizerConfig("bytes")


def documents(count, seed=0):
    generator = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "δέλτα", "epsilon\n"]
    return [
        f"{index} " + " ".join(generator.choice(words, size=generator.integers(5, 60)))
        for index in range(count)
    ]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def domain(*paths, **options):
    units, ignored = plan(paths, source="test", **options)
    return DomainInput(units, {"test": "CC0-1.0"}, ignored)


def small_units(path, pieces):
    """A file of lines in more units than its size asks for."""
    (unit,), _ = plan([path], source="test")
    borders = [unit.size * piece // pieces for piece in range(pieces + 1)]
    units = [
        replace(unit, start=start, stop=stop, size=stop - start)
        for start, stop in itertools.pairwise(borders)
    ]
    return DomainInput(units, {"test": "CC0-1.0"})


def texts_of(corpus, split, name="text"):
    reader = IndexedReader(corpus / split / name)
    tokenizer = ByteTokenizer()
    for index in range(len(reader)):
        ids = reader.doc(index)
        assert ids[-1] == tokenizer.eod_id
        yield tokenizer.decode(ids)


def digest_of(corpus):
    """Hash of every byte of a corpus, its unfinished work apart."""
    files = sorted(path for path in corpus.rglob("*") if path.is_file() and WORK not in path.parts)
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_text_comes_back_in_order_with_its_counts(tmp_path):
    texts = documents(300)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = tmp_path / "corpus"
    manifest = prepare(corpus, {"text": domain(path)}, BYTES, Options(heldout=0.1), workers=1)
    train, heldout = list(texts_of(corpus, "train")), list(texts_of(corpus, "heldout"))
    assert train == [text for text in texts if text in set(train)]
    assert sorted(train + heldout) == sorted(texts)
    assert 10 <= len(heldout) <= 60
    record = manifest.domains["text"]
    assert record.train.documents == len(train)
    assert record.train.bytes == sum(len(text.encode()) for text in train)
    assert record.train.tokens == record.train.bytes + len(train)
    assert record.sources["test"].license == "CC0-1.0"
    assert record.sources["test"].documents == 300
    assert record.input.documents == 300
    assert manifests.read(corpus) == manifest
    assert not list((corpus / WORK).glob("text/*"))


def test_output_does_not_depend_on_the_workers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(400))
    digests = []
    for workers in (1, 3):
        corpus = tmp_path / f"{workers}"
        prepare(corpus, {"text": small_units(path, 7)}, BYTES, Options(0.1), workers=workers)
        digests.append(digest_of(corpus))
    assert digests[0] == digests[1]
    assert set(digests[0]) == {
        "manifest.json",
        *(f"{split}/text.{end}" for split in ("train", "heldout") for end in ("bin", "idx")),
    }


KILLED = """
import os, pathlib, signal, sys
sys.path[:0] = [{tests!r}]
from test_prepare import BYTES, Options, prepare, small_units

calls = 0
def progress(stage, done, total):
    global calls
    calls += stage.startswith({stage!r})
    if calls == {call}:
        import multiprocessing
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    prepare(pathlib.Path({corpus!r}), {{"text": small_units(pathlib.Path({path!r}), 9)}}, BYTES,
            Options(0.1), workers={workers}, progress=progress)
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("stage", "call", "workers"), [("tokenize", 4, 2), ("tokenize", 5, 1), ("write", 6, 1)]
)
def test_killed_run_goes_on_to_the_same_bytes(tmp_path, stage, call, workers):
    """Killed while tokenising or while writing; no worker may outlive the run."""
    path = write_jsonl(tmp_path / "a.jsonl", documents(400))
    corpus, whole = tmp_path / "killed", tmp_path / "whole"
    prepare(whole, {"text": small_units(path, 9)}, BYTES, Options(0.1), workers=1)
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED.format(
            tests=str(Path(__file__).parent),
            stage=stage,
            call=call,
            corpus=str(corpus),
            path=str(path),
            workers=workers,
        )
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert result.returncode == -9
    workers_left = [int(pid) for pid in result.stdout.split()]
    assert len(workers_left) == (workers if workers > 1 else 0)
    deadline = time.monotonic() + 20
    while any(map(alive, workers_left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers_left))
    if (corpus / manifests.FILE_NAME).exists():
        assert not manifests.read(corpus).domains, "an unfinished domain must not be vouched for"

    seen = []
    prepare(
        corpus,
        {"text": small_units(path, 9)},
        BYTES,
        Options(0.1),
        workers=1,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    name, done, total = seen[0]
    assert name == "tokenize"
    assert done >= total * (call - 1) // 9 - 9 if stage == "tokenize" else done == total
    assert digest_of(corpus) == digest_of(whole)


def test_same_command_again_does_nothing_and_another_option_does(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    corpus = tmp_path / "corpus"
    prepare(corpus, {"text": domain(path)}, BYTES, Options(0.1), workers=1)
    before = (corpus / "train/text.bin").stat().st_mtime_ns
    prepare(corpus, {"text": domain(path)}, BYTES, Options(0.1), workers=1)
    assert (corpus / "train/text.bin").stat().st_mtime_ns == before
    manifest = prepare(corpus, {"text": domain(path)}, BYTES, Options(0.0), workers=1)
    assert manifest.domains["text"].train.documents == 50
    assert manifest.domains["text"].heldout is None
    assert not (corpus / "heldout/text.bin").exists(), "of the earlier share"


def test_changed_input_is_read_again(tmp_path):
    """A part of yesterday's file under today's name would mix two corpora."""
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    corpus = tmp_path / "corpus"
    prepare(corpus, {"text": domain(path)}, BYTES, Options(0.0), workers=1)
    write_jsonl(path, documents(50, seed=1))
    prepare(corpus, {"text": domain(path)}, BYTES, Options(0.0), workers=1)
    assert list(texts_of(corpus, "train")) == documents(50, seed=1)


def test_duplicates_keep_the_first_across_files(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one", " ", ""])
    b = write_jsonl(tmp_path / "b.jsonl", ["two", "three", "two  \n", "four"])
    expected = {
        "exact": (["one", "two", "three", "two  \n", "four"], 2),
        "whitespace": (["one", "two", "three", "four"], 3),
        "none": (["one", "two", "one", "two", "three", "two  \n", "four"], 0),
    }
    for dedup, (texts, duplicates) in expected.items():
        corpus = tmp_path / dedup
        manifest = prepare(corpus, {"text": domain(a, b)}, BYTES, Options(0.0, dedup), workers=1)
        assert list(texts_of(corpus, "train")) == texts
        read = manifest.domains["text"].input
        assert (read.documents, read.duplicates, read.empty) == (9, duplicates, 2)


def test_held_out_documents_stay_held_out_when_others_come(tmp_path):
    """A split by position would move documents between the sides, and leak."""
    texts = documents(400)
    sides = []
    for number, chosen in enumerate([texts, [*documents(100, seed=3), *texts[::-1][:350]]]):
        corpus = tmp_path / f"{number}"
        path = write_jsonl(tmp_path / f"{number}.jsonl", chosen)
        prepare(corpus, {"text": domain(path)}, BYTES, Options(0.2), workers=1)
        sides.append(set(texts_of(corpus, "heldout")))
    common = set(texts[50:])
    assert sides[0] & common == sides[1] & common
    assert 30 < len(sides[0]) < 140


def test_bad_input_is_refused_when_all_else_is_done(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", documents(20))
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "misnamed"}\nnot json\n')
    corpus = tmp_path / "corpus"
    inputs = {"text": domain(good), "other": domain(bad)}
    with pytest.raises(BadInputError, match=r"line 2.*must have the text field 'text'") as caught:
        prepare(corpus, inputs, BYTES, Options(0.0), workers=1)
    assert caught.value.count == 2
    assert len(list((corpus / WORK / "text").glob("*.npz"))) == 1, "finished parts are kept"
    manifest = prepare(corpus, inputs, BYTES, Options(0.0, skip_bad_input=True), workers=1)
    assert manifest.domains["other"].input.skipped == 2
    assert list(texts_of(corpus, "train", "other")) == ["fine"]
    with pytest.raises(BadInputError):
        prepare(corpus, inputs, BYTES, Options(0.0), workers=1)


def test_invalid_utf8_is_kept_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    manifest = prepare(
        tmp_path / "corpus", {"text": domain(tmp_path / "a.txt")}, BYTES, Options(0.0), workers=1
    )
    assert manifest.domains["text"].input.repaired == 1
    assert list(texts_of(tmp_path / "corpus", "train")) == ["caf\ufffd"]


def test_second_domain_joins_and_another_tokenizer_is_refused(tmp_path, bpe_file):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    corpus = tmp_path / "corpus"
    prepare(corpus, {"text": domain(path)}, BYTES, Options(0.0), workers=1)
    manifest = prepare(corpus, {"code": domain(path)}, BYTES, Options(0.0), workers=1)
    assert list(manifest.domains) == ["code", "text"]
    bpe = TokenizerConfig("bpe", str(bpe_file))
    with pytest.raises(ConfigError, match="its domains use bytes"):
        prepare(corpus, {"more": domain(path)}, bpe, Options(0.0), workers=1)


def test_corpus_keeps_a_copy_of_its_tokenizer(tmp_path, bpe_file):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    corpus = tmp_path / "corpus"
    for _ in range(2):
        prepare(
            corpus,
            {"text": domain(path)},
            TokenizerConfig("bpe", str(bpe_file)),
            Options(0.0),
            workers=1,
        )
        assert (corpus / "tokenizer/tokenizer.json").read_bytes() == bpe_file.read_bytes()
    assert not list((corpus / "tokenizer").glob("*.[0-9]*"))


def test_one_process_at_a_time_prepares_a_domain(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(5))
    corpus = tmp_path / "corpus"
    with exclusive(corpus / WORK / "text.lock"):
        with pytest.raises(ConfigError, match="one process at a time"):
            prepare(corpus, {"text": domain(path)}, BYTES, Options(0.0), workers=1)
        prepare(corpus, {"other": domain(path)}, BYTES, Options(0.0), workers=1)


def test_dead_worker_is_one_line(tmp_path, monkeypatch):
    from concurrent.futures.process import BrokenProcessPool

    from kimi_pretrain.data import workers

    class Broken:
        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, *arguments):
            raise BrokenProcessPool("killed")

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Broken)
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    with pytest.raises(ConfigError, match="--workers 1"):
        prepare(tmp_path / "c", {"text": small_units(path, 3)}, BYTES, Options(0.0), workers=2)


@pytest.mark.parametrize("options", [{"heldout": 1.0}, {"heldout": -0.1}, {"dedup": "fuzzy"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        Options(**options)
