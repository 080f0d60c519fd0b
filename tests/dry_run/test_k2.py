"""K2 on 512 and on 2,048 GPUs, whole steps: as planned, in a minute and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60.0  # of a processor, a rank
MEMORY = 4 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("dp", [32, 128])
@pytest.mark.parametrize("rank", ["0", "1", "last"])
def test_a_rank_is_as_planned_within_a_minute(dp: int, rank: str, tmp_path: Path) -> None:
    """Catches a rank that differs in a step as long as the run's, and one that nobody waits for."""
    overrides = ["experiment=k2_1t_h800_2048", f"parallel.dp={dp}"]
    command = ["plan", "--dry-run", "--json", "--ranks", rank, *overrides]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, "-m", "kimi_pretrain", *command], stdout=said)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    (counted,) = json.loads((tmp_path / "said").read_text())["ranks"]
    assert counted["rank"] == {"0": 0, "1": 1, "last": 16 * dp - 1}[rank]
    assert all(row["agrees"] for row in counted["rows"])
    assert used.ru_utime + used.ru_stime < SECONDS
    assert 1024 * used.ru_maxrss < MEMORY
