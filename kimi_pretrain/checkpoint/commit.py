"""How the ranks of a run make one checkpoint together, without a collective.

Every rank's background thread writes its files into one temporary directory, flushes them
to disk, and then puts down a part: a JSON file with their names, sizes and hashes, which
appears by a rename, whole. Rank 0 waits for the parts of all ranks, merges them into the
manifest and gives the directory its name by one rename. A rank that dies leaves its part
missing, and the checkpoint never gets its name.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kimi_pretrain.checkpoint.store import (
    FORMAT,
    MANIFEST,
    REPLACED,
    WRITING,
    CheckpointError,
    checkpoint_name,
    sha256,
)
from kimi_pretrain.parallel.errors import PeerError

_NAMED = 8  # missing ranks that an error lists


def commit(
    root: Path,
    step: int,
    write: Callable[[Path], Iterable[str]],
    rank: int = 0,
    world: int = 1,
    deadline: float = 600.0,
    abandoned: threading.Event | None = None,
) -> Path:
    """Make this rank's files part of the checkpoint of `step`; rank 0 completes it.

    A checkpoint of that step which is already there is replaced, since it can only be one
    that failed verification or the very same state.

    Args:
        root: the directory of checkpoints, on a file system that all ranks share.
        step: of the checkpoint; a step is committed once between two calls of
            ``store.remove_unfinished``.
        write: fills the directory it is given and returns the names of its files.
        rank: of this process.
        world: number of ranks that write.
        deadline: seconds that rank 0 waits for the other ranks' parts once its own is there.
        abandoned: set by another thread, it ends that wait.

    Returns:
        The checkpoint's directory. On ranks other than 0 it may not exist yet.

    Raises:
        PeerError: on rank 0, the parts of other ranks are missing at the deadline.
        CheckpointError: on rank 0, two ranks wrote a file of one name.
    """
    final = root / checkpoint_name(step)
    temporary = root / f"{WRITING}{final.name}"
    temporary.mkdir(parents=True, exist_ok=True)
    files = {name: _described(temporary / name) for name in write(temporary)}
    _flush(temporary)
    # The last touch of a rank other than 0: the directory may have its new name right after.
    _put_json(temporary / _part_name(rank, world), files)
    if rank != 0:
        return final
    _await_parts(temporary, world, deadline, abandoned or threading.Event())
    merged = _merge(temporary, world)
    for entry in temporary.iterdir():
        if entry.name not in merged:  # the parts, and what an attempt that failed left
            entry.unlink()
    _put_json(temporary / MANIFEST, {"format": FORMAT, "files": merged})
    _flush(temporary)
    _replace(temporary, final)
    return final


def _described(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _part_name(rank: int, world: int) -> str:
    return f"part-{rank + 1:05d}-of-{world:05d}.json"


def _await_parts(temporary: Path, world: int, deadline: float, abandoned: threading.Event) -> None:
    wanted = {_part_name(rank, world): rank for rank in range(world)}
    until = time.monotonic() + deadline
    pause = 0.005
    while missing := sorted(
        wanted[name] for name in wanted.keys() - {entry.name for entry in temporary.iterdir()}
    ):
        if abandoned.is_set() or time.monotonic() >= until:
            named = ", ".join(map(str, missing[:_NAMED])) + (", ..." if missing[_NAMED:] else "")
            reason = "given up" if abandoned.is_set() else f"after {deadline:g} s"
            raise PeerError(
                f"{temporary}: {reason}, {len(missing)} of {world} ranks have not written their "
                f"part: {named}"
            )
        abandoned.wait(min(pause, max(0.0, until - time.monotonic())))
        pause = min(2 * pause, 1.0)


def _merge(temporary: Path, world: int) -> dict[str, Any]:
    """Every file of the parts, by name."""
    merged: dict[str, Any] = {}
    for rank in range(world):
        part = json.loads((temporary / _part_name(rank, world)).read_text())
        twice = sorted(merged.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{temporary / twice[0]}: written by two ranks, one is {rank}")
        merged |= part
    return dict(sorted(merged.items()))


def _replace(temporary: Path, final: Path) -> None:
    """Give `temporary` its final name; at every moment one whole copy of the step exists."""
    aside = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        # A directory cannot be renamed over a full one. Of two copies aside, one is enough.
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    temporary.rename(final)
    _flush(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _put_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that `path` appears whole, and flush it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    _flush(partial)
    partial.rename(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
