"""A directory of safetensors files in Hugging Face's layout, read and written tensor by tensor.

Either one ``model.safetensors`` or ``model-00001-of-00003.safetensors`` ... with
``model.safetensors.index.json``, whose ``weight_map`` names the file of every tensor.
Nothing here unpickles: a directory with ``pytorch_model.bin`` only is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class WeightFiles:
    """The tensors of a checkpoint directory by name; files are mapped into memory, not read.

    Use as a context manager. Iteration yields names, file after file.

    Raises:
        ConfigError: no safetensors, an unreadable file, or an index that does not fit them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._home: dict[str, str] = {}  # tensor name -> file name

    def __enter__(self) -> Self:
        with self._stack:  # closes what was opened if a later file is refused
            single, index = self.directory / SINGLE, self.directory / INDEX
            if single.exists() and index.exists():
                rule = "a checkpoint is one file or an index with its shards"
                raise ConfigError(
                    f"weights in {self.directory}", f"{SINGLE} and {INDEX}", rule, "removing one"
                )
            if index.exists():
                self._home = self._indexed(index)
            elif single.exists():
                self._home = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
            else:
                raise self._no_weights()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def home(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._home[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._files[self._home[name]].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Element type as safetensors spells it (F32, BF16, F8_E4M3), from the file's header."""
        return str(self._files[self._home[name]].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in; valid after the files are closed."""
        tensor: Tensor = self._files[self._home[name]].get_tensor(name)
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise ConfigError(
                    f"weights file {path}", "missing", f"{INDEX} names it", "a new copy"
                )
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                rule = "it is a complete safetensors file"
                raise ConfigError(f"weights file {path}", str(error), rule, "a new copy") from error
            self._files[file] = self._stack.enter_context(opened)
        return self._files[file]

    def _indexed(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            rule = "weight_map names the file of every tensor"
            raise ConfigError(f"{index}: weight_map", weight_map, rule, "a new copy of the index")
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                rule = "shards lie beside the index"
                raise ConfigError(f"{index}: file of {name}", file, rule, "a plain file name")
            by_file.setdefault(file, []).append(name)
        home: dict[str, str] = {}
        for file in sorted(by_file):
            inside = set(self._open(file).keys())
            for name in by_file[file]:
                if name not in inside:
                    rule = f"{INDEX} says that this file holds it"
                    raise ConfigError(f"tensor {name} in {file}", "missing", rule, "a new copy")
                home[name] = file
        return home

    def _no_weights(self) -> ConfigError:
        found = sorted(path.name for path in self.directory.iterdir() if path.is_file())
        rule = f"weights are {SINGLE} or {INDEX} with its shards"
        if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
            rule += "; pickle files (.bin, .pt) can run code and are never read"
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        return ConfigError(
            f"weights in {self.directory}", shown or "no files", rule, "a safetensors copy"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConfigError if the file is absent or is something else."""
    rule = "it is a readable JSON object"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), str(error), rule, "a complete checkpoint copy") from error
    if not isinstance(value, dict):
        raise ConfigError(str(path), type(value).__name__, rule, "a complete checkpoint copy")
    return value


def write_weights(directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Write named tensors as one file, or as an index and shards of at most ``shard_bytes``.

    A tensor larger than the limit gets a shard of its own. Weights that an earlier export
    left in the directory go first, and the index comes last, so that an interrupted export
    is refused on reading instead of being taken for a model.
    """
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    stream_weights(directory, sizes, tensors.__getitem__, shard_bytes)


def stream_weights(
    directory: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], shard_bytes: int
) -> None:
    """``write_weights`` of tensors that are read as their shard is written.

    Args:
        directory: where to.
        sizes: bytes of each tensor, in the order in which they are written.
        read: gives a tensor of that size by its name; called once each.
        shard_bytes: a file's largest size, and with it the memory that is needed.
    """
    (directory / INDEX).unlink(missing_ok=True)
    (directory / SINGLE).unlink(missing_ok=True)
    for pattern in ("model-*-of-*.safetensors", ".model*.partial"):
        for stale in directory.glob(pattern):
            stale.unlink()
    shards = plan_shards(sizes, shard_bytes)
    if len(shards) == 1:
        _save(directory / SINGLE, {name: read(name) for name in shards[0]})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(directory / file, {name: read(name) for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into runs of at most ``limit`` bytes (or one name)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object through a rename, so that readers see all of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with torch.no_grad():
        # transformers 4 reads no file without "format".
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata={"format": "pt"})
    partial.replace(path)
