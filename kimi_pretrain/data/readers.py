"""Documents out of files: what one worker does with its unit of input.

A reader yields documents and defects in the order of the input and never drops anything
without saying so: whoever consumes it decides whether a defect stops the run.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data import python_text
from kimi_pretrain.data.documents import Defect, Document, Item, Unit, decoded, valid_text

READ_BYTES = 1 << 20


def read(unit: Unit) -> Iterator[Item]:
    """Every document and defect of a unit, in the order of the input."""
    reader = READERS[unit.reader]
    for path in unit.paths:
        try:
            yield from reader(Path(path), unit)
        except (OSError, EOFError, zlib.error) as error:
            # The latter two come where a compressed or parquet file is cut off or damaged.
            reason = getattr(error, "strerror", None) or str(error)
            yield Defect("input file", path, f"it must be readable ({reason})", _SKIP)


def open_stream(path: Path) -> io.BufferedIOBase:
    """Open a file for reading, decompressing ``.gz`` and ``.zst`` on the way."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), READ_BYTES)
    return path.open("rb")


def parquet_file(path: Path) -> Any:
    """Open a parquet file.

    Raises ConfigError without pyarrow, OSError or EOFError if the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise _needs("pyarrow", path, error) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise EOFError(str(error).splitlines()[0]) from error


_SKIP = "a whole file in its place, or --bad-input skip to count it and go on"


def _text(path: Path, unit: Unit) -> Iterator[Item]:
    """The whole file is one document."""
    with open_stream(path) as file:
        yield decoded(file.read())


def _lines(path: Path, unit: Unit) -> Iterator[Item]:
    """Every line is one document."""
    for _, line in _numbered(path, unit):
        yield decoded(line.rstrip(b"\r\n"))


def _jsonl(path: Path, unit: Unit) -> Iterator[Item]:
    """Every line is an object; its text field is one document."""
    for place, line in _numbered(path, unit):
        if not line.strip():
            continue
        raw = decoded(line)
        try:
            record = json.loads(raw.text)
        except ValueError as error:
            rule = f"a line must be one JSON object ({error})"
            yield Defect(f"JSON of {path}, {place}", _shown(raw.text), rule, _SKIP_RECORD)
            continue
        if not isinstance(record, dict):
            rule = "a line must be one JSON object"
            yield Defect(f"JSON of {path}, {place}", _shown(raw.text), rule, _SKIP_RECORD)
            continue
        yield _field(record, unit.text_field, f"{path}, {place}", raw.repaired)


def _parquet(path: Path, unit: Unit) -> Iterator[Item]:
    """Every row is a record; its text column is one document."""
    file = parquet_file(path)
    stop = file.num_row_groups if unit.stop is None else unit.stop
    try:
        for group in range(unit.start, stop):
            row = 0
            for batch in file.iter_batches(1024, row_groups=[group], columns=[unit.text_field]):
                for value in batch.column(0).to_pylist():
                    place = f"{path}, row {row} of row group {group}"
                    yield _field({unit.text_field: value}, unit.text_field, place, repaired=False)
                    row += 1
    except _arrow_errors() as error:
        raise EOFError(str(error).splitlines()[0]) from error


def _arrow_errors() -> type[Exception]:
    import pyarrow

    damage: type[Exception] = pyarrow.ArrowException
    return damage


def _prose(path: Path, unit: Unit) -> Iterator[Item]:
    """What a Python file, or an installed package's METADATA, says in words."""
    with open_stream(path) as file:
        yield from python_text.prose(path, file.read())


READERS: dict[str, Callable[[Path, Unit], Iterator[Item]]] = {
    "text": _text,
    "lines": _lines,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "prose": _prose,
}

_SKIP_RECORD = "a corrected record, or --bad-input skip to count it and go on"


def _field(record: dict[str, Any], name: str, place: str, repaired: bool) -> Item:
    if name not in record:
        rule = f"every record must have the text field {name!r}"
        fix = f"--text-field with one of {', '.join(sorted(record)[:8])}, or --bad-input skip"
        return Defect(f"record of {place}", _shown(", ".join(record)), rule, fix)
    value = record[name]
    if not isinstance(value, str):
        rule = f"the text field {name!r} must be a string"
        return Defect(f"record of {place}", _shown(repr(value)), rule, _SKIP_RECORD)
    document = valid_text(value)
    return Document(document.text, repaired=document.repaired or repaired)


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _numbered(path: Path, unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Lines that start in [start, stop), each with the words that find it again."""
    with open_stream(path) as file:
        position = unit.start
        if unit.start > 0:
            # The line that holds the byte before belongs to the unit before.
            file.seek(unit.start - 1)
            position += len(file.readline()) - 1
        number = 0
        while unit.stop is None or position < unit.stop:
            line = file.readline()
            if not line:
                return
            number += 1
            place = f"line {number}" if unit.start == 0 else f"byte {position}"
            yield place, line
            position += len(line)


def _needs(package: str, path: Path, error: ModuleNotFoundError) -> ConfigError:
    if error.name != package:
        raise error
    return ConfigError(
        "input file", str(path), f"reading it needs the package {package}", f"pip install {package}"
    )


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a file of one or more zstd frames.

    The package's own reader ends quietly where a file is cut off; this one raises EOFError
    as gzip does.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise _needs("zstandard", path, error) from error
        self._damage: type[Exception] = zstandard.ZstdError
        # The limit is on the encoder's side: frames of `zstd --long=31` must open too.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._file = path.open("rb")
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._damage as error:
                raise EOFError(f"damaged zstd frame: {error}") from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
