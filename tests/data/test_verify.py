import json
import shutil

import numpy as np
import pytest

from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data.documents import Unit
from kimi_pretrain.data.indexed import IndexedWriter
from kimi_pretrain.data.prepare import DomainInput, Options, prepare
from kimi_pretrain.data.stats import corpus_lines, prefix_lines, table
from kimi_pretrain.data.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory, bpe_file):
    folder = tmp_path_factory.mktemp("verify")
    path = folder / "a.txt"
    path.write_text("\n".join(f"document {index} with some words" for index in range(200)))
    units = [Unit("lines", (str(path),), path.stat().st_size, "src")]
    prepare(
        folder / "corpus",
        {"text": DomainInput(units, {"src": "MIT"})},
        TokenizerConfig("bpe", str(bpe_file)),
        Options(heldout=0.1),
        workers=1,
    )
    return folder / "corpus"


@pytest.fixture
def corpus(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "corpus")


def rewritten(corpus, change, name="text"):
    """Change tokens of the training file in place, the manifest's hashes following."""
    from kimi_pretrain.data.merge import sha256

    path = corpus / f"train/{name}.bin"
    tokens = np.fromfile(path, "<u2")
    change(tokens)
    tokens.tofile(path)
    manifest = corpus / "manifest.json"
    content = json.loads(manifest.read_text())
    content["domains"][name]["train"]["bin_sha256"] = sha256(path)
    manifest.write_text(json.dumps(content))


def only(defects, *words):
    assert len(defects) == 1, defects
    assert "\n" not in defects[0]
    for word in words:
        assert word in defects[0]


def test_sound_corpus_and_prefix_have_no_defect(corpus):
    assert verify(corpus) == []
    assert verify(corpus / "train/text") == []


def test_flipped_bit_is_found(corpus):
    path = corpus / "heldout/text.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    defects = verify(corpus)
    assert any("heldout/text.bin: SHA-256" in line for line in defects)
    assert any("SHA-256" in line for line in verify(corpus / "heldout/text"))


def test_cut_off_file_is_found(corpus):
    path = corpus / "train/text.bin"
    path.write_bytes(path.read_bytes()[:-2])
    only(verify(corpus), "train/text.bin", "bytes")


def test_missing_file_is_found(corpus):
    (corpus / "train/text.idx").unlink()
    only(verify(corpus), "train/text.idx", "must both exist")


def test_token_outside_the_vocabulary_is_found(corpus):
    """A hash proves nothing where the writer itself was wrong."""

    def change(tokens):
        tokens[7] = 1024

    rewritten(corpus, change)
    only(verify(corpus), "token 7 is 1024", "0 to 1023")


def test_lost_end_of_document_is_found(corpus):
    def change(tokens):
        tokens[np.flatnonzero(tokens == 0)[3]] = 5

    rewritten(corpus, change)
    defects = verify(corpus)
    assert any("document 3 does not end with token 0" in line for line in defects)
    assert any("end-of-document tokens in" in line for line in defects)


def test_tokens_that_stand_for_other_text_are_found(corpus):
    def change(tokens):
        tokens[0] = np.uint16(900 if tokens[0] != 900 else 901)

    rewritten(corpus, change)
    only(verify(corpus), "bytes of text, the manifest says")


def test_changed_tokenizer_is_found(corpus):
    path = corpus / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace(" ", "", 1))
    only(verify(corpus), "fingerprint")


def test_counts_that_do_not_add_up_are_found(corpus):
    path = corpus / "manifest.json"
    content = json.loads(path.read_text())
    content["domains"]["text"]["input"]["documents"] += 1
    content["domains"]["text"]["train"]["documents"] -= 1
    path.write_text(json.dumps(content))
    defects = verify(corpus)
    assert any("documents, the manifest says" in line for line in defects)
    assert any("documents were read" in line for line in defects)


def test_files_the_manifest_does_not_know_are_found(corpus):
    for end in ("bin", "idx"):
        shutil.copy(corpus / f"train/text.{end}", corpus / f"train/stray.{end}")
    only(verify(corpus), "stray.bin")


@pytest.mark.parametrize("text", ["{}", "not json", '{"format": 99}', '{"format": 1}', "[]"])
def test_broken_manifest_is_one_line(corpus, text):
    (corpus / "manifest.json").write_text(text)
    only(verify(corpus), "manifest.json")


def test_no_manifest_at_all(tmp_path):
    only(verify(tmp_path), "manifest.json")
    only(verify(tmp_path / "absent"), "absent.idx")


def test_megatrons_own_files_need_no_manifest(tmp_path):
    with IndexedWriter(tmp_path / "own", 100) as writer:
        writer.add_document(np.arange(10))
    assert verify(tmp_path / "own") == []
    index = tmp_path / "own.idx"
    data = bytearray(index.read_bytes())
    data[34] ^= 1
    index.write_bytes(data)
    assert len(verify(tmp_path / "own")) == 1


def test_stats_show_what_the_manifest_says(corpus):
    lines = list(corpus_lines(corpus))
    assert any("1,024 ids" in line for line in lines)
    (train,) = [line.split() for line in lines if line.startswith("text    train")]
    (heldout,) = [line.split() for line in lines if line.startswith("text    heldout")]
    assert int(train[2]) + int(heldout[2]) == 200
    assert any("200 documents read" in line for line in lines)
    assert any("src" in line and "MIT" in line for line in lines)
    shown = list(prefix_lines(corpus / "train/text"))
    assert any("uint16" in line for line in shown)
    assert any(line.split()[:2] == ["documents", train[2]] for line in shown)


def test_table_aligns():
    assert list(table(("name", "count"), [("a", "1,000"), ("long name", "7")])) == [
        "name       count",
        "a          1,000",
        "long name      7",
    ]
