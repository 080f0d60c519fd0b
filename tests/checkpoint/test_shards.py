"""Directories of safetensors: one file, shards with an index, and what is not accepted."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kimi_pretrain.checkpoint.shards import INDEX, SINGLE, WeightFiles, plan_shards, write_weights
from kimi_pretrain.config.errors import ConfigError

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),  # 24 bytes
    "b": torch.arange(4, dtype=torch.bfloat16),  # 8 bytes
    "c": torch.arange(8.0, dtype=torch.float64),  # 64 bytes
    "d": torch.tensor([7.0]),  # 4 bytes
}


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    with WeightFiles(directory) as files:
        return {name: files.read(name) for name in files}


@pytest.mark.parametrize(("limit", "shards"), [(10**6, 1), (100, 1), (64, 3), (32, 3), (1, 4)])
def test_what_is_written_is_read(tmp_path: Path, limit: int, shards: int) -> None:
    """Catches a tensor lost or changed at a shard boundary, or unreadable after closing."""
    write_weights(tmp_path, TENSORS, limit)
    found = read_all(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert (tmp_path / INDEX).exists() == (shards > 1)


def test_files_say_their_format(tmp_path: Path) -> None:
    """Catches a file that transformers 4 refuses, though transformers 5 reads it."""
    write_weights(tmp_path, TENSORS, 10**6)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_index_names_every_tensor_and_the_total(tmp_path: Path) -> None:
    """Catches an index that other readers cannot follow."""
    write_weights(tmp_path, TENSORS, 64)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 100
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",
        "d": "model-00003-of-00003.safetensors",
    }


def test_shards_keep_to_the_limit() -> None:
    """Catches an off-by-one at the limit and an empty first shard."""
    assert plan_shards({"a": 5, "b": 5, "c": 1}, 10) == [["a", "b"], ["c"]]
    assert plan_shards({"a": 50, "b": 5, "c": 5}, 10) == [["a"], ["b", "c"]]


@pytest.mark.parametrize(("first", "second"), [(1, 10**6), (10**6, 1), (1, 64)])
def test_an_export_replaces_an_earlier_one(tmp_path: Path, first: int, second: int) -> None:
    """Catches stale shards beside a new index; other files of the directory stay."""
    (tmp_path / "tokenizer.json").write_text("{}")
    write_weights(tmp_path, {name: tensor + 1 for name, tensor in TENSORS.items()}, first)
    write_weights(tmp_path, TENSORS, second)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    write_weights(fresh, TENSORS, second)
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == {path.name for path in fresh.iterdir()} | {"tokenizer.json"}
    assert torch.equal(read_all(tmp_path)["a"], TENSORS["a"])


def test_pickle_files_are_never_read(tmp_path: Path) -> None:
    """Catches a fall back to torch.load: unpickling runs what the file says."""

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match=r"got 'pytorch_model.bin'; .*never read; try .*safetens"):
        read_all(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_empty_directory(tmp_path: Path) -> None:
    """Catches a model left at its random initialisation."""
    with pytest.raises(ConfigError, match="got 'no files'"):
        read_all(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    """Catches a half-downloaded shard read as zeros, or a bare traceback."""
    write_weights(tmp_path, TENSORS, 10**6)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-4])
    with pytest.raises(ConfigError, match=r"model\.safetensors: got .*complete safetensors file"):
        read_all(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    """Catches an incomplete download."""
    write_weights(tmp_path, TENSORS, 64)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00003\.safetensors: got 'missing'"):
        read_all(tmp_path)


def test_a_shard_without_its_tensor(tmp_path: Path) -> None:
    """Catches shards of two checkpoints mixed in one directory."""
    write_weights(tmp_path, TENSORS, 64)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ConfigError, match=r"tensor c in model-00002.*: got 'missing'"):
        read_all(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_pointing_elsewhere(tmp_path: Path, file: object) -> None:
    """Catches a downloaded index that reads files outside its directory."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ConfigError, match="file of a: got"):
        read_all(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_an_unreadable_index(tmp_path: Path, text: str) -> None:
    """Catches a bare JSON traceback."""
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json.*: got"):
        read_all(tmp_path)


def test_one_file_beside_an_index(tmp_path: Path) -> None:
    """Catches reading one of two checkpoints by chance."""
    write_weights(tmp_path, TENSORS, 64)
    save_file(TENSORS, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match="removing one"):
        read_all(tmp_path)
