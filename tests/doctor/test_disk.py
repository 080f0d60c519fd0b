"""Speed and room of a run's file system."""

import errno
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.doctor import disk
from kimi_pretrain.doctor.findings import BAD, NOTE, OK

SIZE = 8 << 20


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    """Catches a run directory made by a look at it, and a file of random bytes left behind."""
    found = disk.measure(tmp_path / "runs" / "a", SIZE)
    assert found.write > 0
    assert found.read > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk found by the first checkpoint."""

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", full)
    found, measured = disk.disk_finding(tmp_path, 1, 1)
    assert (found.level, measured) == (BAD, None)
    assert "No space left on device" in found.text


@pytest.mark.parametrize(
    ("checkpoint", "level"), [(100, OK), (300, NOTE), (1100, BAD)], ids=["three", "one", "none"]
)
def test_room_is_held_against_the_checkpoints_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int, level: str
) -> None:
    """Catches room for two kept checkpoints and none for the one being written."""
    monkeypatch.setattr(disk, "measure", lambda path: disk.Disk(1e9, 1e9, free=800))
    found, _ = disk.disk_finding(tmp_path, checkpoint, 2)
    assert found.level == level
