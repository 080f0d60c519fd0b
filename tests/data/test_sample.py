import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.documents import Unit
from kimi_pretrain.data.sample import sample, train_bpe


@pytest.fixture
def units(tmp_path):
    result = []
    for index in range(20):
        path = tmp_path / f"{index}.txt"
        path.write_text(
            "".join(f"unit {index} line {line} of some length\n" for line in range(100))
        )
        result.append(Unit("lines", (str(path),), path.stat().st_size))
    return result


def test_sample_is_spread_over_the_input_and_as_large_as_asked(units):
    """The first units alone would be one author's, or one letter of the alphabet."""
    texts = list(sample(units, 10_000, 0.0, "exact"))
    assert 10_000 <= sum(map(len, texts)) < 12_000
    assert {text.split()[1] for text in texts} == {str(index) for index in range(20)}
    assert texts == list(sample(units, 10_000, 0.0, "exact"))


def test_small_input_is_taken_whole(units):
    assert len(list(sample(units, 10**9, 0.0, "exact"))) == 2000
    assert list(sample([], 10**9, 0.0, "exact")) == []


def test_held_out_documents_teach_no_merges(units):
    everything = set(sample(units, 10**9, 0.0, "exact"))
    kept = set(sample(units, 10**9, 0.3, "exact"))
    assert kept < everything
    assert 0.6 < len(kept) / len(everything) < 0.8


def test_training_writes_the_file_in_one_step(tmp_path, units):
    stages = []
    file = tmp_path / "tokenizer" / "tokenizer.json"
    train_bpe(
        file,
        {"a": units[:10], "b": units[10:]},
        {"a": 5000, "b": 5000},
        270,
        0.0,
        "exact",
        lambda *step: stages.append(step),
    )
    assert file.is_file()
    assert list(file.parent.iterdir()) == [file]
    assert stages[-1] == ("train tokenizer", 10_000, 10_000)
    with pytest.raises(ConfigError, match="merges for"):
        train_bpe(file, {"a": units}, {"a": 5000}, 4000, 0.0, "exact")
