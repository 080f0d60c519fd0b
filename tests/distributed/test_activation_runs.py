"""Activation policies and schedule files with copies and recomputations, from the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.config.activation import PRESETS
from kimi_pretrain.pipeline.passes import insert_offload, insert_p2p, insert_recompute
from kimi_pretrain.pipeline.schedules import generate
from kimi_pretrain.telemetry.jsonl import TIMING_FIELDS

STEPS, HALF = 4, 2
MOVED = {"offloaded_bytes", "not_offloaded_bytes"}
# K2's policy without FP8, which alone rounds.
EXACT = [
    "activation=custom",
    *(
        f"+activation.tags.{tag}={policy.replace('fp8+', '')}"
        for tag, policy in PRESETS["k2"].items()
    ),
]


def train(run_dir: Path, steps: int, *overrides: str) -> str:
    """Two pipeline ranks of two stages; what the command says."""
    command = [
        *(sys.executable, "-m", "kimi_pretrain", "train", "experiment=smoke", "launcher=local"),
        *("parallel.pp=2", "parallel.vpp=2", "parallel.schedule=k2", "precision=fp64"),
        *("schedule.global_batch_size=8", "schedule.micro_batch_size=1"),
        *("data.sequence_length=32", "parallel.router_weights=before_down"),
        *(f"schedule.max_steps={steps}", f"schedule.checkpoint_interval={HALF}"),
        *("schedule.eval_interval=100", "schedule.sample_tokens=0", "logging.report=false"),
        *("logging=jsonl", f"run_dir={run_dir}", *overrides),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMING_FIELDS | MOVED}
        for line in lines
    ]


@pytest.mark.slow
def test_a_run_goes_on_under_another_policy_and_a_schedule_file(tmp_path: Path) -> None:
    """Catches a checkpoint that means a policy, and a file's copies or recomputations that are
    refused, left out or put in twice: the losses are those of a run that keeps everything."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, STEPS)
    train(resumed, HALF)
    schedule = insert_recompute(insert_offload(insert_p2p(generate("k2", 2, 2, 8))))
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(schedule.to_text()))
    (resumed / "summary.json").unlink()
    room = "activation.host_bytes=10000000"
    told = train(resumed, STEPS, *EXACT, room, f"parallel.schedule_file={file}")
    assert "resumed from" in told
    assert rows(resumed) == rows(whole)
    last = json.loads((resumed / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["offloaded_bytes"] > 0
    assert last["not_offloaded_bytes"] == 0
