"""What a rank leaves for the process that started it."""

import os
from pathlib import Path

import pytest

from kimi_pretrain.launch.rank import EXITS, IDS, RANKS_DIR, report_as_rank, settle, settled_code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (IDS, EXITS):
        (tmp_path / name).mkdir()
    variables = {RANKS_DIR: str(tmp_path), "LOCAL_RANK": "1", "RANK": "9"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "restarts", "ends"),
    [(0, 0, 0), (75, 0, 0), (3, 0, 0), (2, 0, 0), (4, 0, 4), (1, 0, 1), (75, 3, 75)],
)
def test_torchrun_restarts_only_ranks_that_were_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, restarts: int, ends: int
) -> None:
    """Catches a run that starts again after it was told to stop, or after a guard."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    assert settle(code) == ends
    assert settled_code(folder) == (code if ends != code else None)


def test_under_a_torchrun_of_ones_own_the_code_is_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a refusal that ends with 0 because nobody reads what was left."""
    monkeypatch.delenv(RANKS_DIR, raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    report_as_rank()
    assert settle(2) == 2


def test_a_restarted_rank_forgets_how_the_last_one_ended(folder: Path) -> None:
    """Catches a run that ended well and is said to have been refused."""
    (folder / EXITS / "1").write_text("2")
    report_as_rank()
    assert settled_code(folder) is None
    assert (folder / IDS / "1").read_text() == str(os.getpid())
