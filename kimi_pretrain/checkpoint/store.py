"""The directory of a run's checkpoints: atomic commit, verification, retention.

Layout, one directory a checkpoint (design 4.9)::

    checkpoints/step-00000100/
        weights.safetensors     one tensor a global (Hugging Face) parameter name
        optimizer.safetensors   "<kind>/<global name>", e.g. "momentum/model.norm.weight"
        state.json              step, tokens and whatever the writer wants back
        manifest.json           bytes and SHA-256 of each file above

A checkpoint is written under a temporary name, flushed to disk, and gets its own name by
one rename. There is no pointer to "the latest": it is the newest directory whose files
match their hashes, so nothing on disk can lie about it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"


class CheckpointError(Exception):
    """A checkpoint on disk is damaged or is not what its manifest says."""


def checkpoint_step(directory: Path) -> int:
    """The step that a checkpoint directory is named after."""
    match = _NAME.fullmatch(directory.name)
    if match is None:
        raise CheckpointError(f"{directory} is not named like a checkpoint (step-00000100)")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Every committed checkpoint below `root`, newest first; none verified yet."""
    if not root.is_dir():
        return []
    found = [entry for entry in root.iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def commit(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary directory, then make it the checkpoint of `step`.

    A checkpoint of that step which is already there is replaced, since it can only be one
    that failed verification or the very same state.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    write(temporary)
    files = sorted(path for path in temporary.iterdir() if path.is_file())
    manifest = {
        "format": FORMAT,
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files},
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, temporary / MANIFEST, temporary):
        _flush(path)
    if final.exists():
        # A directory cannot be renamed over a full one; step the old one aside first.
        aside = root / f"{_TEMPORARY}replaced-{final.name}"
        final.rename(aside)
        shutil.rmtree(aside)
    temporary.rename(final)
    _flush(root)
    return final


def verify(directory: Path) -> None:
    """Raise CheckpointError unless every file has the size and hash its manifest names."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = manifest["files"].items()
        version = manifest["format"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory}: no readable {MANIFEST} ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{directory}: format {version}, this version reads {FORMAT}")
    for name, expected in files:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 differs from its manifest")


def latest_verified(root: Path, rejected: Callable[[CheckpointError], None]) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not goes to `rejected`."""
    for directory in list_checkpoints(root):
        try:
            verify(directory)
        except CheckpointError as error:
            rejected(error)
            continue
        return directory
    return None


def prune(root: Path, keep: int, step: int) -> None:
    """Of the checkpoints up to `step`, which was just written, keep the newest `keep`.

    Later ones are of an earlier start and failed verification: counting them would leave
    nothing to go on from.
    """
    written = [d for d in list_checkpoints(root) if checkpoint_step(d) <= step]
    for directory in written[keep:]:
        shutil.rmtree(directory)


def remove_unfinished(root: Path) -> None:
    """Remove what a killed writer left behind."""
    if root.is_dir():
        for entry in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(entry)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
