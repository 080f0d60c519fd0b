"""A run of several ranks tells what its time went to and whom everyone waits for."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_resume import train_as_rank

SLOW, PLANTED, STEPS = 3, 0.5, 2  # the slow rank, seconds more that it computes a step


def train_with_a_slow_rank(rank: int, world_size: int, run_dir: str) -> int:
    import kimi_pretrain.train.step as step_module

    if rank == SLOW:
        plain = step_module.to_device

        def slowly(batch: Any, rows: slice, device: Any) -> Any:
            if rows.start == 0:
                time.sleep(PLANTED)
            return plain(batch, rows, device)

        step_module.to_device = slowly
    return train_as_rank(rank, world_size, run_dir, 2, STEPS, pp=2, vpp=1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of two ranks, the experts spread over both ranks of a stage."""
    made = tmp_path_factory.mktemp("runs") / "slow"
    assert run_ranks(4, train_with_a_slow_rank, str(made), timeout=240) == [0] * 4
    return made


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_slow_rank_is_named_with_its_host(run_dir: Path) -> None:
    """Catches a straggler sought among those who wait, or among ranks that do other work."""
    import socket

    (row,) = rows(run_dir / "ranks.jsonl")
    assert row["step"] == row["steps"] == STEPS
    assert row["straggler"] == SLOW
    assert row["straggler_ratio"] > 1.5
    worst = row["slowest"][0]
    assert (worst["rank"], worst["host"], worst["stage"]) == (SLOW, socket.gethostname(), 1)
    assert worst["part"] == "compute"
    assert row["least_waiting"]["rank"] == SLOW


def test_others_wait_for_it_where_they_meet_it(run_dir: Path) -> None:
    """Catches a wait for experts or for a pipeline stage that is not told as one: the other rank
    of its stage waits for the slow one's rows, the stage before for its gradients."""
    (row,) = rows(run_dir / "ranks.jsonl")
    assert row["parts"]["ep"]["max"] > 0.8 * PLANTED
    assert row["parts"]["pp"]["max"] > 0.8 * PLANTED
    assert row["parts"]["compute"]["max"] > PLANTED


def test_a_row_s_parts_add_up_to_its_step(run_dir: Path) -> None:
    """Catches time that belongs to no part, or to two."""
    from kimi_pretrain.telemetry.breakdown import PARTS

    found = rows(run_dir / "metrics.jsonl")
    assert len(found) == STEPS
    for row in found:
        whole = sum(row[f"{part}_seconds"] for part in PARTS)
        assert whole == pytest.approx(row["step_seconds"], rel=1e-9)
        assert row["step_seconds"] > PLANTED
        assert 0 < row["goodput"] < 1
