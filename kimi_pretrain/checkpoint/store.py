"""The directory of a run's checkpoints: listing, verification and retention.

Layout, one directory a checkpoint (design 4.9)::

    checkpoints/step-00000100/
        weights.safetensors     one tensor a global (Hugging Face) parameter name
        optimizer.safetensors   "<kind>/<global name>", e.g. "momentum/model.norm.weight"
        state.json              step, tokens and whatever the writer wants back
        manifest.json           bytes and SHA-256 of each file above

N ranks write N files of each kind, ``weights-00001-of-00008.safetensors`` and so on. There
is no pointer to "the latest": it is the newest directory whose files match their hashes, so
nothing on disk can lie about it. What has another name than a step's (``.writing-``,
``.replaced-``, ``.removed-``) is unfinished work and is never listed.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
WRITING = ".writing-"  # a checkpoint that is not whole yet
REPLACED = ".replaced-"  # the old one of a step that is being written again
REMOVED = ".removed-"  # one that is being deleted
_NAME = re.compile(r"step-(\d{8,})")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\..+)")


class CheckpointError(Exception):
    """A checkpoint on disk is damaged or is not what its manifest says."""


def checkpoint_name(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(directory: Path) -> int:
    """The step that a checkpoint directory is named after."""
    match = _NAME.fullmatch(directory.name)
    if match is None:
        raise CheckpointError(f"{directory} is not named like a checkpoint (step-00000100)")
    return int(match[1])


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is there and named like a checkpoint; it may still be damaged."""
    return _NAME.fullmatch(directory.name) is not None and directory.is_dir()


def list_checkpoints(root: Path) -> list[Path]:
    """Every committed checkpoint below `root`, newest first; none verified yet."""
    if not root.is_dir():
        return []
    return sorted(filter(is_checkpoint, root.iterdir()), key=checkpoint_step, reverse=True)


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of a checkpoint, in order.

    Raises:
        CheckpointError: no manifest, one of another format, or one that lists some but not
            all of N numbered files.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = dict(manifest["files"])
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: no readable {MANIFEST} ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{directory}: format {version}, this version reads {FORMAT}")
    missing = missing_files(files)
    if missing:
        raise CheckpointError(f"{directory / MANIFEST}: does not list {missing[0]}")
    return files


def missing_files(names: Iterable[str]) -> list[str]:
    """What `names` lack: a file numbered i of N calls for all N. Pure."""
    present = set(names)
    wanted = {
        f"{match['stem']}-{number:05d}-of-{match['count']}{match['suffix']}"
        for match in map(_NUMBERED.fullmatch, present)
        if match is not None
        for number in range(1, int(match["count"]) + 1)
    }
    return sorted(wanted - present)


def ranks(files: Iterable[str]) -> int:
    """How many ranks wrote the files of a manifest."""
    counts = (int(m["count"]) for m in map(_NUMBERED.fullmatch, files) if m is not None)
    return max(counts, default=1)


def verify(directory: Path) -> None:
    """Raise CheckpointError unless every file has the size and hash its manifest names."""
    verify_share(directory, 0, 1)


def verify_share(directory: Path, rank: int, world: int) -> None:
    """`verify` for every `world`-th file of the manifest, from the `rank`-th on.

    `world` ranks thus verify a checkpoint of any layout together; whether each of them found
    its share whole is for the caller to combine.
    """
    for name, expected in list(read_manifest(directory).items())[rank::world]:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
            )
        if sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 differs from its manifest")


def prune(root: Path, keep: int, step: int) -> None:
    """Of the checkpoints up to `step`, which was just written, keep the newest `keep`.

    Later ones are of an earlier start and failed verification: counting them would leave
    nothing to go on from.
    """
    written = [d for d in list_checkpoints(root) if checkpoint_step(d) <= step]
    for directory in written[keep:]:
        # Under another name first: a kill half-way leaves nothing that looks like a checkpoint.
        going = root / f"{REMOVED}{directory.name}"
        directory.rename(going)
        shutil.rmtree(going)


def remove_unfinished(root: Path) -> None:
    """Remove what a killed writer left behind, before any rank writes.

    A checkpoint that was put aside for its replacement comes back if the replacement did
    not get its name.
    """
    if not root.is_dir():
        return
    for aside in root.glob(f"{REPLACED}*"):
        final = root / aside.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    for prefix in (WRITING, REMOVED):
        for entry in root.glob(f"{prefix}*"):
            shutil.rmtree(entry)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
