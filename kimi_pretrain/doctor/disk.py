"""Speed and room of the file system that a run directory is on."""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding

BYTES = 64 << 20
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Disk:
    """Bytes a second of one host alone with itself, and bytes that are free."""

    write: float
    read: float
    free: int


def measure(directory: Path, size: int = BYTES) -> Disk:
    """Write ``size`` bytes to disk, drop them from memory and read them again.

    In the nearest directory above that exists, without leaving a file.

    Raises:
        OSError: it cannot be written, or is full.
    """
    place = existing(directory)
    block = os.urandom(_BLOCK)  # file systems compress zeros away
    with tempfile.TemporaryFile(dir=place) as file:
        began = time.perf_counter()
        for _ in range(size // _BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        again = time.perf_counter()
        while file.read(_BLOCK):
            pass
        read = time.perf_counter()
    return Disk(size / (written - began), size / (read - again), shutil.disk_usage(place).free)


def existing(directory: Path) -> Path:
    """The directory, or the nearest above it that exists."""
    directory = directory.absolute()
    while not directory.is_dir():
        directory = directory.parent
    return directory


def disk_finding(directory: Path, checkpoint_bytes: int, kept: int) -> tuple[Finding, Disk | None]:
    """What there is to say, and what was measured.

    Args:
        directory: of the run.
        checkpoint_bytes: of one checkpoint.
        kept: how many stay.
    """
    what = f"disk of {directory}"
    try:
        disk = measure(directory)
    except OSError as error:
        text = f"cannot be written: {error.strerror}"
        return Finding(BAD, what, text, "run_dir=DIR on a file system with room"), None
    text = (
        f"writes {disk.write / 1e6:,.0f} MB/s, reads {disk.read / 1e6:,.0f} MB/s, "
        f"{disk.free / 1e9:,.0f} GB free"
    )
    needed = checkpoint_bytes * (kept + 1)  # an old one goes once the new one is whole
    if disk.free < needed:
        level = BAD if disk.free < checkpoint_bytes else NOTE
        text += f", and {kept + 1} checkpoints take {needed / 1e9:,.1f} GB"
        return Finding(level, what, text, "run_dir=DIR, or schedule.keep_checkpoints=1"), disk
    return Finding(OK, what, text), disk
