"""Atomic commit, verification and retention of checkpoint directories."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_pretrain.checkpoint.commit import commit
from kimi_pretrain.checkpoint.store import (
    CheckpointError,
    checkpoint_step,
    list_checkpoints,
    prune,
    remove_unfinished,
    verify,
)


def _write(text: str) -> Callable[[Path], list[str]]:
    def write(directory: Path) -> list[str]:
        (directory / "state.json").write_text(text)
        return ["state.json"]

    return write


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    """Catches a verification that only looks at the manifest."""
    directory = commit(tmp_path, 7, _write("seven"))
    verify(directory)
    if damage == "truncate":
        (directory / "state.json").write_text("sev")
    elif damage == "remove":
        (directory / "state.json").unlink()
    else:
        (directory / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json|manifest\.json"):
        verify(directory)


def test_a_writer_that_dies_leaves_nothing_to_trust(tmp_path: Path) -> None:
    """Catches a checkpoint that becomes visible before it is whole."""

    def die(directory: Path) -> list[str]:
        (directory / "state.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit(tmp_path, 3, die)
    assert list_checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    """Catches names sorted as text, or the oldest kept."""
    for step in (9, 10, 100_000_000):
        commit(tmp_path, step, _write(str(step)))
    prune(tmp_path, 2, step=100_000_000)
    assert [checkpoint_step(d) for d in list_checkpoints(tmp_path)] == [100_000_000, 10]


def test_prune_does_not_count_later_damaged_ones(tmp_path: Path) -> None:
    """Catches a resume from step 9 after 100 was damaged, whose checkpoint 10 is removed
    because 100 is newer."""
    for step in (8, 9, 100, 10):
        commit(tmp_path, step, _write(str(step)))
    prune(tmp_path, 1, step=10)
    assert [checkpoint_step(d) for d in list_checkpoints(tmp_path)] == [100, 10]


def test_a_kill_while_pruning_lists_nothing_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a half-deleted checkpoint that still has a checkpoint's name."""
    for step in (1, 2):
        commit(tmp_path, step, _write(str(step)))

    def killed(directory: Path) -> None:
        (directory / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1, step=2)
    monkeypatch.undo()
    assert [checkpoint_step(d) for d in list_checkpoints(tmp_path)] == [2]
    remove_unfinished(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    """Catches a rename onto a full directory, which the system refuses."""
    commit(tmp_path, 5, _write("damaged"))
    directory = commit(tmp_path, 5, _write("whole"))
    verify(directory)
    assert (directory / "state.json").read_text() == "whole"
