"""What a run leaves when it ends: a loss that fell, a fair bigram beside it, a sample, a report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.config import compose, exit_codes
from kimi_pretrain.data.batches import TrainStream, heldout_windows
from kimi_pretrain.data.corpus import ensure
from kimi_pretrain.data.ngram import Bigram
from kimi_pretrain.train.loop import train

STEPS = 8


def _overrides(run_dir: Path) -> list[str]:
    return [
        "experiment=smoke",
        "precision=fp32",
        "model.n_routed_experts=8",
        f"schedule.max_steps={STEPS}",
        "data.sequence_length=64",
        "logging.console=off",
        f"run_dir={run_dir}",
    ]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "ended"
    assert train(compose(_overrides(run_dir))) == exit_codes.DONE
    return run_dir


def _rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def _summary(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def test_the_loss_falls_and_the_summary_tells_the_last_evaluation(ended: Path) -> None:
    """Catches an update with the wrong sign, and a summary of an earlier evaluation."""
    losses = [row["loss"] for row in _rows(ended, "metrics.jsonl")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1.0
    last = _rows(ended, "evals.jsonl")[-1]
    assert last["step"] == STEPS
    for key in ("heldout_loss", "bits_per_byte", "domains"):
        assert _summary(ended)[key] == last[key]


def test_the_bigram_was_fitted_to_exactly_the_tokens_of_the_run(ended: Path) -> None:
    """Catches a baseline made weak by a batch left out, or judged on other held-out text."""
    config = compose(_overrides(ended))
    data = ensure(config.data)
    bigram = Bigram(config.model.vocab_size)
    samples = STEPS * config.schedule.global_batch_size
    bigram.update(TrainStream(data, config.data, config.seed).read(0, samples))
    heldout = heldout_windows(data, config.data, config.schedule.eval_sequences, samples)
    assert _summary(ended)["bigram_loss"] == pytest.approx(
        bigram.loss(batch for _, batch in heldout), rel=1e-12
    )


def test_a_sample_and_a_report_are_left(ended: Path) -> None:
    """Catches an ending that no test but the slow ones ever reached."""
    summary = _summary(ended)
    assert summary["prompt"]
    assert summary["sample"]
    assert summary["tokens"] == STEPS * 4 * 64
    page = (ended / "report" / "index.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert (ended / "report" / "overview.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_default_run_beats_a_bigram_model(tmp_path: Path) -> None:
    """Catches a change that lets everything run and nothing learn: `make train` promises this."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "kimi_pretrain", "train", f"run_dir={run_dir}"]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    summary = _summary(run_dir)
    assert summary["heldout_loss"] < summary["bigram_loss"] - 0.1
    assert (run_dir / "report" / "index.html").is_file()
