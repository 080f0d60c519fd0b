"""From paths a person names to units of work: which files, in which format, cut where.

The cut depends on the input alone, never on the number of workers, so that prepared files
are the same bytes on two cores and on two hundred.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.data.documents import Unit
from kimi_pretrain.data.readers import READERS, parquet_file

COMPRESSIONS = (".gz", ".zst")
RECORD_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# One file, one document. `.json` is left out: it may hold records, so `--format` must say.
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml",
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".rs",
    ".go", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".cs", ".swift", ".rb", ".php",
    ".pl", ".pm", ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".lisp",
    ".el", ".f90", ".f", ".sql", ".sh", ".bash", ".ps1", ".m", ".v", ".sv", ".vhd", ".lean", ".thy",
    ".toml", ".yaml", ".yml", ".ini", ".cfg", ".css", ".scss", ".proto", ".cmake", ".mk", ".s",
    ".asm",
))
# fmt: on
FORMATS = tuple(READERS)
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "node_modules"})

SMALLEST_UNIT = 1 << 20
LARGEST_UNIT = 64 << 20
UNITS_WANTED = 64  # so that progress moves and the last worker does not work alone


def plan(
    inputs: Sequence[Path],
    text_field: str = "text",
    format: str | None = None,
    source: str = "",
) -> tuple[list[Unit], int]:
    """Units that cover every input in order, and how many files of directories were ignored.

    A directory gives its files in order of their paths, without hidden ones and links.
    ``format`` overrides what the suffix says. Raises ConfigError for a path that does not
    exist, for a format that cannot be told, and for a parquet file without ``text_field``.
    """
    files: list[tuple[Path, str]] = []
    ignored = 0
    for path in inputs:
        if path.is_dir():
            for file in walk(path):
                known = format or format_of(file)
                ignored += known is None
                if known:
                    files.append((file, known))
        elif path.is_file():
            files.append((path, format or format_of(path) or _untold(path)))
        else:
            raise _absent(path)
    sizes = {path: path.stat().st_size for path, _ in files}
    limit = unit_bytes(sum(sizes.values()))
    units = [
        unit
        for path, known in files
        for unit in _cut(
            Unit(known, (str(path),), sizes[path], source=source, text_field=text_field), limit
        )
    ]
    return list(grouped(units, limit)), ignored


def format_of(path: Path) -> str | None:
    """Format by suffix, looking through a compression; None if it is not known as text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return RECORD_SUFFIXES.get(last) or ("text" if last in TEXT_SUFFIXES else None)


def walk(root: Path, skip: frozenset[str] = SKIPPED_DIRECTORIES) -> Iterator[Path]:
    """Files below a directory, names in order at every level; no links, nothing hidden.

    Directories named in `skip` are not entered. Raises ConfigError for one that cannot be
    listed.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(
            "input directory",
            str(root),
            f"it must be readable ({error.strerror})",
            f"chmod u+rx {root}, or name its files without it",
        ) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            if entry.name not in skip:
                yield from walk(Path(entry.path), skip)
        elif entry.is_file():
            yield Path(entry.path)


def unit_bytes(total: int) -> int:
    """Size of a unit for an input of ``total`` bytes: about 64 units, 1 to 64 MiB each."""
    return min(max(total // UNITS_WANTED, SMALLEST_UNIT), LARGEST_UNIT)


def grouped(units: Sequence[Unit], limit: int) -> Iterator[Unit]:
    """Neighbouring whole files of one reader and source joined while they fit into ``limit``."""
    group: list[Unit] = []
    size = 0
    for unit in units:
        joins = group and unit.stop is None and unit.start == 0
        joins = joins and replace(unit, paths=(), size=0) == replace(group[0], paths=(), size=0)
        if group and not (joins and size + unit.size <= limit):
            yield _joined(group)
            group, size = [], 0
        group.append(unit)
        size += unit.size
    if group:
        yield _joined(group)


def _joined(group: Sequence[Unit]) -> Unit:
    paths = tuple(path for unit in group for path in unit.paths)
    return replace(group[0], paths=paths, size=sum(unit.size for unit in group))


def _cut(whole: Unit, limit: int) -> Iterator[Unit]:
    """Cut a file where its format allows: lines by bytes, parquet by row groups."""
    path = Path(whole.paths[0])
    if whole.reader == "parquet":
        yield from _row_groups(whole, limit)
    elif whole.reader in ("lines", "jsonl") and path.suffix.lower() not in COMPRESSIONS:
        pieces = max(1, -(-whole.size // limit))
        borders = [whole.size * piece // pieces for piece in range(pieces + 1)]
        if pieces == 1:
            yield whole
        else:
            for start, stop in itertools.pairwise(borders):
                yield replace(whole, start=start, stop=stop, size=stop - start)
    else:
        yield whole


def _row_groups(whole: Unit, limit: int) -> Iterator[Unit]:
    path = Path(whole.paths[0])
    try:
        file = parquet_file(path)
    except (OSError, EOFError):
        # Its reader will meet the same and report it among the other defects.
        yield whole
        return
    columns = file.schema_arrow.names
    if whole.text_field not in columns:
        raise ConfigError(
            f"text column of {path}",
            whole.text_field,
            f"the file has the columns {', '.join(columns[:12])}",
            "--text-field " + nearest_name(whole.text_field, columns or ["text"]),
        )
    count = file.num_row_groups
    per_unit = max(1, count * limit // max(whole.size, 1))
    for start in range(0, count, per_unit):
        stop = min(start + per_unit, count)
        yield replace(whole, start=start, stop=stop, size=whole.size * (stop - start) // count)


def _untold(path: Path) -> NoReturn:
    raise ConfigError(
        "format of an input file",
        str(path),
        "its suffix tells the format: .jsonl, .parquet, .txt, a source suffix, each also .gz, .zst",
        f"--format {' or '.join(FORMATS)}",
    )


def _absent(path: Path) -> ConfigError:
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return ConfigError(
        "input path",
        str(path),
        "it must be an existing file or directory",
        str(parent / nearest_name(path.name, names)) if names else "a path that exists",
    )
