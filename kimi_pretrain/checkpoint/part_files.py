"""Tensors in the files of one checkpoint, each file written by one rank.

One rank writes ``weights.safetensors``; rank r of N writes
``weights-<r + 1>-of-<N>.safetensors``. A whole tensor lies under its name in its shape. A
part lies under ``<name>[start:stop]`` as a vector of those elements of the flattened tensor,
and the file's metadata, under "shapes", holds the shape of the whole as JSON.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from kimi_pretrain.checkpoint.reshard import Part, cover_defect, covering_rows, reads
from kimi_pretrain.checkpoint.store import CheckpointError, missing_files

SHAPES = "shapes"
_PART = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")

Shape = tuple[int, ...]


def file_name(stem: str, rank: int, world: int) -> str:
    """The file that a rank writes; numbers count from 1, as in Hugging Face's shards."""
    return (
        f"{stem}.safetensors" if world == 1 else f"{stem}-{rank + 1:05d}-of-{world:05d}.safetensors"
    )


def key_of(name: str, shape: Shape, start: int, count: int) -> str:
    """The key of `count` elements from `start` on: the name alone if that is the whole."""
    return name if count == math.prod(shape) else f"{name}[{start}:{start + count}]"


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], shapes: Mapping[str, Shape]
) -> None:
    """Write one rank's tensors by key; `shapes` are of the tensors that it holds in part."""
    parts = {name: list(shape) for name, shape in sorted(shapes.items())}
    save_file(dict(tensors), path, metadata={SHAPES: json.dumps(parts)} if parts else None)


class PartFiles:
    """The tensors under one stem ("weights", "optimizer") of a checkpoint, whoever wrote them.

    Headers are read once; data is read only where it is asked for. A context manager.

    Raises:
        CheckpointError: files that are missing or are not safetensors, a part without a shape.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory = directory
        self._parts: dict[str, list[Part]] = {}
        self._shapes: dict[str, Shape] = {}
        self._checked: set[str] = set()
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        pattern = re.compile(rf"{re.escape(stem)}(-\d{{5,}}-of-\d{{5,}})?\.safetensors")
        files = sorted(p.name for p in directory.iterdir() if pattern.fullmatch(p.name))
        missing = missing_files(files) if files else [f"{stem}.safetensors"]
        if missing:
            raise CheckpointError(f"{directory / missing[0]}: missing")
        for file in files:
            self._read_header(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def require(self, name: str, shape: Shape) -> None:
        """Raise CheckpointError unless the files hold every element of `name` exactly once."""
        if name not in self._shapes:
            file = self.directory / "*.safetensors"
            raise CheckpointError(f"{file}: no file holds {name}, which this model needs")
        parts, found = self._parts[name], self._shapes[name]
        if found != shape:
            file = self.directory / parts[0].file
            raise CheckpointError(
                f"{file}: {name} is {list(found)}, this model needs {list(shape)}"
            )
        if name not in self._checked:
            defect = cover_defect(parts, math.prod(shape))
            if defect is not None:
                raise CheckpointError(f"{self.directory}: {name}: {defect}")
            self._checked.add(name)

    def fill(self, name: str, shape: Shape, start: int, values: Tensor) -> None:
        """Read elements [start, start + values.numel()) of `name` into the vector `values`.

        Raises CheckpointError as `require` does.
        """
        self.require(name, shape)
        for read in reads(self._parts[name], start, start + values.numel()):
            target = values[read.offset : read.offset + read.stop - read.start]
            target.copy_(self._elements(read.part, shape, read.start, read.stop))

    def read(self, name: str, shape: Shape) -> Tensor:
        """The whole tensor, in the type in which it is stored."""
        self.require(name, shape)
        first = self._parts[name][0]
        if first.key == name:
            whole: Tensor = self._file(first.file).get_tensor(name)
            return whole
        dtype = self._file(first.file).get_tensor(first.key).dtype
        values = torch.empty(math.prod(shape), dtype=dtype)
        self.fill(name, shape, 0, values)
        return values.view(shape)

    def _elements(self, part: Part, shape: Shape, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a part; of a whole matrix only the rows that hold them."""
        stored = self._file(part.file).get_slice(part.key)
        saved_shape = stored.get_shape()
        if not saved_shape:
            scalar: Tensor = self._file(part.file).get_tensor(part.key)
            return scalar.view(1)
        first, last, skip = covering_rows(saved_shape, start, stop)
        rows: Tensor = stored[first:last]
        return rows.reshape(-1)[skip : skip + stop - start]

    def _read_header(self, file: str) -> None:
        opened = self._file(file)
        recorded: dict[str, list[int]] = json.loads((opened.metadata() or {}).get(SHAPES, "{}"))
        for key in opened.keys():  # noqa: SIM118
            stored: Shape = tuple(opened.get_slice(key).get_shape())
            match = _PART.fullmatch(key)
            if match is None:
                self._add(key, stored, Part(0, math.prod(stored), file, key))
                continue
            name, start, stop = match["name"], int(match["start"]), int(match["stop"])
            if name not in recorded:
                raise CheckpointError(f"{self.directory / file}: no shape of {name} for {key}")
            if stored != (stop - start,):
                raise CheckpointError(f"{self.directory / file}: {key} is {list(stored)}")
            self._add(name, tuple(recorded[name]), Part(start, stop, file, key))

    def _add(self, name: str, shape: Shape, part: Part) -> None:
        known = self._shapes.setdefault(name, shape)
        if known != shape:
            other = self._parts[name][0].file
            raise CheckpointError(
                f"{self.directory / part.file}: {name} is {list(shape)}, {other} says {list(known)}"
            )
        self._parts.setdefault(name, []).append(part)

    def _file(self, file: str) -> Any:
        """The file, mapped into memory and kept so: that holds no descriptor."""
        if file not in self._files:
            path = self.directory / file
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not readable as safetensors ({error})") from error
            self._files[file] = self._stack.enter_context(opened)
        return self._files[file]
