"""The record of a run: one JSON object a line, appended and flushed row by row.

``metrics.jsonl`` holds one row a step, ``evals.jsonl`` one an evaluation, ``layers.jsonl`` the
per-layer arrays and ``ranks.jsonl`` a comparison of ranks every so many steps,
``summary.json`` one object at the end. Floats are written by ``repr``, so reading gives back
the same bits. Values that JSON has no word for are written as Python's ``json`` module writes
and reads them: ``NaN``, ``Infinity``, ``-Infinity``. They stay numbers that way for
``json.loads`` and pandas; jq reads null and the largest finite numbers, and a strict reader
refuses the line.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry.breakdown import PARTS

FILES = {
    "step": "metrics.jsonl",
    "eval": "evals.jsonl",
    "layers": "layers.jsonl",
    "ranks": "ranks.jsonl",
}
SUMMARY = "summary.json"
_BLOCK = 1 << 16  # bytes that newest_rows goes back at a time

# What a resumed run may report differently from an uninterrupted one.
TIMING_FIELDS = frozenset(
    {"step_seconds", "tokens_per_second", "mfu", "seconds", "goodput"}
    | {f"{part}_seconds" for part in (*PARTS, "checkpoint")}
)


class JsonlSink:
    """Appends rows to the files above; a directory without rows gets no empty files.

    A kind's file is opened at its first row. A line that an earlier process left torn is
    cut off then, so that a new row never continues it.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._open: dict[str, BinaryIO] = {}

    def row(self, kind: str, values: dict[str, Any]) -> None:
        """Writes one row of kind ``step``, ``eval``, ``layers``, ``ranks`` or ``summary``.

        Arrays and scalars that offer ``tolist`` (numpy, tensors) are written as lists and
        numbers. Raises ``KeyError`` on another kind, ``TypeError`` on a value that is none
        of these, ``OSError`` when the disk is full.
        """
        if kind == "summary":
            text = json.dumps(values, default=_as_list, indent=2) + "\n"
            _replace(self._run_dir / SUMMARY, text.encode())
            return
        if kind not in self._open:
            path = self._run_dir / FILES[kind]
            _cut_torn_line(path)
            self._open[kind] = path.open("ab")
        file = self._open[kind]
        file.write(_line(values))
        file.flush()

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        while self._open:
            self._open.popitem()[1].close()


def truncate_after(run_dir: Path, step: int) -> None:
    """Forgets everything a run recorded after ``step``, as if it had been killed there.

    Called with the restored step before a resumed run records again, so that the steps it
    repeats are recorded once. Rows lie in the order of their steps, hence each file is cut
    at one offset by one system call, and being killed between two files is harmless: the
    next start cuts the rest. A torn last line goes too, and ``summary.json`` when it tells
    of another number of tokens than remain.

    Raises:
        ConfigError: a complete line of the part to keep is not a JSON object.
    """
    last = None
    for kind, name in FILES.items():
        path = run_dir / name
        kept = 0
        for row, size in _rows(path):
            if row["step"] > step:
                break
            kept += size
            last = row if kind == "step" else last
        if path.exists() and kept < path.stat().st_size:
            os.truncate(path, kept)
    summary = run_dir / SUMMARY
    if summary.exists() and not summary_is_current(json.loads(summary.read_bytes()), last):
        summary.unlink()


def summary_is_current(summary: dict[str, Any], last_step: dict[str, Any] | None) -> bool:
    """Whether a summary describes the run as it stands at its last recorded step."""
    return last_step is not None and summary.get("tokens") == last_step.get("tokens")


def read_rows(
    path: Path, keep: Callable[[int], bool] = lambda index: True
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file that may still be growing; a missing file has none.

    Rows whose index ``keep`` refuses are skipped unparsed. A torn last line is not a row.

    Raises:
        ConfigError: a complete line is not a JSON object.
    """
    return (row for row, _ in _rows(path, keep))


def newest_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The last ``count`` rows of a file that may be growing and large, oldest first.

    Raises:
        ConfigError: a complete line among them is not a JSON object.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        start, tail = file.seek(0, os.SEEK_END), b""
        while start > 0 and tail.count(b"\n") <= count:
            start = max(0, start - _BLOCK)
            file.seek(start)
            tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1].splitlines()[-count:]
    return [_parse(line, str(path)) for line in whole]


def append_row(path: Path, values: dict[str, Any]) -> None:
    """Adds one row to a file that is written once a start, after any line left torn."""
    _cut_torn_line(path)
    with path.open("ab") as file:
        file.write(_line(values))


def _rows(
    path: Path, keep: Callable[[int], bool] = lambda index: True
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields each row with the bytes of its line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if not line.endswith(b"\n"):
                return
            if keep(index):
                yield _parse(line, f"{path} line {index + 1}"), len(line)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ConfigError(
            what=where,
            value=line[:40].decode(errors="replace"),
            rule="every line is one JSON object",
            fix="removing that line",
        )
    return row


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, default=_as_list).encode() + b"\n"


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a row holds numbers, strings and arrays, not {type(value).__name__}")


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
