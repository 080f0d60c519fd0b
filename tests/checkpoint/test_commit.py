"""Ranks that make one checkpoint together, and ranks that die on the way."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_pretrain.checkpoint.commit import commit
from kimi_pretrain.checkpoint.store import (
    CheckpointError,
    list_checkpoints,
    ranks,
    read_manifest,
    remove_unfinished,
    verify,
    verify_share,
)
from kimi_pretrain.parallel.errors import PeerError


def _write(rank: int, world: int, text: str = "x") -> Callable[[Path], list[str]]:
    def write(directory: Path) -> list[str]:
        name = f"weights-{rank + 1:05d}-of-{world:05d}.safetensors"
        (directory / name).write_text(text * (rank + 1))
        return [name]

    return write


def _together(root: Path, step: int, world: int) -> Path:
    """Every rank in a thread of its own; the directory."""
    threads = [
        threading.Thread(target=commit, args=(root, step, _write(rank, world), rank, world, 30.0))
        for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (directory,) = list_checkpoints(root)
    return directory


def test_every_rank_is_in_the_manifest_and_nothing_else_is_left(tmp_path: Path) -> None:
    """Catches a rename before the last part is in, and parts that stay in the checkpoint."""
    directory = _together(tmp_path, 4, 5)
    verify(directory)
    files = read_manifest(directory)
    assert [entry["bytes"] for entry in files.values()] == [1, 2, 3, 4, 5]
    assert ranks(files) == 5
    assert {p.name for p in directory.iterdir()} == {*files, "manifest.json"}
    assert list(tmp_path.iterdir()) == [directory]


def test_a_rank_that_died_is_named_and_nothing_is_listed(tmp_path: Path) -> None:
    """Catches a checkpoint without a rank's share, and a wait without an end."""
    for rank in (3, 1):
        commit(tmp_path, 8, _write(rank, 5), rank, 5)
    with pytest.raises(PeerError, match=r"after 0\.1 s, 2 of 5 ranks .* part: 2, 4"):
        commit(tmp_path, 8, _write(0, 5), 0, 5, deadline=0.1)
    assert list_checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_killed_while_it_writes_is_named(tmp_path: Path) -> None:
    """Catches a file without its part taken for a rank's whole share."""
    program = f"""
import os, signal
from pathlib import Path
from kimi_pretrain.checkpoint.commit import commit
def die(directory):
    (directory / "weights-00002-of-00002.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
commit(Path({str(tmp_path)!r}), 8, die, 1, 2)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -9
    with pytest.raises(PeerError, match=r"1 of 2 ranks .* part: 1$"):
        commit(tmp_path, 8, _write(0, 2), 0, 2, deadline=0.1)
    assert list_checkpoints(tmp_path) == []


def test_a_known_failure_ends_the_wait(tmp_path: Path) -> None:
    """Catches a run that cannot end for ten minutes after a peer is known to be dead."""
    abandoned = threading.Event()
    threading.Timer(0.1, abandoned.set).start()
    with pytest.raises(PeerError, match="given up, 1 of 2 ranks"):
        commit(tmp_path, 8, _write(0, 2), 0, 2, deadline=600.0, abandoned=abandoned)


def test_the_part_is_a_ranks_last_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that still looks for the directory which rank 0 has renamed meanwhile."""
    rename = Path.rename

    def rank_0_is_quick(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if target.name.startswith("part-00002"):
            rename(target.parent, tmp_path / "step-00000008")
        return renamed

    monkeypatch.setattr(Path, "rename", rank_0_is_quick)
    commit(tmp_path, 8, _write(1, 2), 1, 2)
    assert (tmp_path / "step-00000008").is_dir()


def test_a_part_is_of_this_world(tmp_path: Path) -> None:
    """Catches the part of another number of ranks taken for one of this run."""
    commit(tmp_path, 8, _write(1, 3), 1, 3)
    with pytest.raises(PeerError, match="1 of 2 ranks"):
        commit(tmp_path, 8, _write(0, 2), 0, 2, deadline=0.05)


def test_two_ranks_of_one_file_are_refused(tmp_path: Path) -> None:
    """Catches two processes that take themselves for the same rank's files."""
    commit(tmp_path, 8, _write(0, 2), 1, 2)
    with pytest.raises(CheckpointError, match=r"00001-of-00002.* written by two ranks"):
        commit(tmp_path, 8, _write(0, 2), 0, 2)
    assert list_checkpoints(tmp_path) == []


def test_what_a_failed_attempt_left_does_not_stay(tmp_path: Path) -> None:
    """Catches a file in a checkpoint that no hash covers."""

    def die(directory: Path) -> list[str]:
        (directory / "junk").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit(tmp_path, 8, die)
    directory = commit(tmp_path, 8, _write(0, 1))
    assert not (directory / "junk").exists()


@pytest.mark.parametrize("kills_at", [1, 2])
def test_a_kill_while_a_step_is_replaced_keeps_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills_at: int
) -> None:
    """Catches the old checkpoint gone before the new one has its name."""
    directory = commit(tmp_path, 5, _write(0, 1, "old"))
    renames = 0
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        nonlocal renames
        if self.is_dir():
            renames += 1
            if renames == kills_at:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        commit(tmp_path, 5, _write(0, 1, "new"))
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [directory]
    verify(directory)
    assert (directory / "weights-00001-of-00001.safetensors").read_text() == "old"


def _complaint(directory: Path, rank: int, world: int) -> str | None:
    try:
        verify_share(directory, rank, world)
    except CheckpointError as error:
        return str(error)
    return None


def test_shares_cover_every_file(tmp_path: Path) -> None:
    """Catches a file that no rank verifies, when more or fewer ranks load than saved."""
    directory = _together(tmp_path, 4, 5)
    for world in (1, 2, 3, 7):
        for name in read_manifest(directory):
            whole = (directory / name).read_bytes()
            (directory / name).write_bytes(b"y" + whole[1:])
            verdicts = [_complaint(directory, rank, world) for rank in range(world)]
            (complaint,) = filter(None, verdicts)
            assert name in complaint
            (directory / name).write_bytes(whole)


def test_a_manifest_lists_all_ranks(tmp_path: Path) -> None:
    """Catches a checkpoint whose manifest lost a rank, which verifies file by file."""
    directory = _together(tmp_path, 4, 3)
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["weights-00002-of-00003.safetensors"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    for rank in range(3):  # every rank says so, whatever its share is
        with pytest.raises(CheckpointError, match=r"does not list weights-00002-of-00003"):
            verify_share(directory, rank, 3)
