"""Synthetic runs: rows as a training run writes them, from a formula instead of a model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kimi_pretrain.telemetry.jsonl import JsonlSink

SAMPLE = "def f(x):\n    return '<script>alert(1)</script>' & \x1b[31m\x00 x"


def write_run(
    run_dir: Path,
    *,
    steps: int = 400,
    layers: int = 4,
    heads: int = 4,
    experts: int = 96,
    tau: float | None = 100.0,
    logit_scale: float = 1.0,
    tokens_per_step: int = 8192,
    evaluate_every: int = 50,
    layers_every: int = 10,
    finished: bool = True,
) -> Path:
    """Writes a run of so many steps; ``experts=0`` is a dense model, ``0`` intervals: no rows."""
    rng = np.random.default_rng(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"name": "k2_nano", "first_k_dense_replace": 1, "num_hidden_layers": layers},
        "optimizer": {"qk_clip_threshold": tau, "grad_clip": 1.0},
        "data": {"name": "default"},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    slope = rng.uniform(0.3, 1.0, (layers, heads))
    skew = rng.normal(0.0, 1.2, (max(0, layers - 1), experts))
    sink = JsonlSink(run_dir)
    for step in range(1, steps + 1):
        at = step / max(steps, 1)
        logits = logit_scale * (3 + 22 * slope * math.sqrt(at)) + rng.normal(
            0, 0.4, (layers, heads)
        )
        clipped = np.zeros_like(logits, dtype=bool) if tau is None else logits > tau
        # What a training step knows of a head below tau is the log-sum-exp.
        bound = np.where(clipped, logits, logits + 4 * math.exp(-at))
        noise = rng.normal(0, 0.35, skew.shape)
        load = np.exp(skew * math.exp(-4 * at) + noise)
        load /= load.sum(axis=-1, keepdims=True)
        loss = 2.9 + 6.1 * math.exp(-9 * at) + 0.9 * math.exp(-2 * at)
        rate = 11_500 * (0.4 if step == 1 else 1.0) * rng.normal(1, 0.03)
        sink.row("step", {
            "step": step,
            "tokens": step * tokens_per_step,
            "loss": loss + rng.normal(0, 0.07),
            "aux_loss": 0.001 * rng.uniform(),
            "learning_rate": 2e-3 * min(1, at / 0.1) * (0.5 + 0.5 * math.cos(math.pi * at)),
            "grad_norm": float(np.exp(rng.normal(0, 0.25) - at)),
            "max_logit": float(bound.max()),
            "clipped_heads": float(clipped.mean()),
            "load_max_over_mean": float((load.max(-1) * experts).max()) if experts else 1.0,
            "step_seconds": tokens_per_step / rate,
            "tokens_per_second": rate,
            "mfu": rate * 2.6e-5,
        })  # fmt: skip
        if evaluate_every and step % evaluate_every == 0:
            sink.row("eval", {
                "step": step,
                "tokens": step * tokens_per_step,
                "heldout_loss": loss + 0.05,
                "bits_per_byte": (loss + 0.05) / 2.4,
                "domains": {"code": loss - 0.3, "math": loss + 0.1, "prose": loss + 0.35},
                "max_logits": logits,
            })  # fmt: skip
        if layers_every and step % layers_every == 0:
            sink.row("layers", {
                "step": step,
                "max_logits": bound,
                "exact": clipped,
                "clipped": clipped,
                "expert_load": load if experts else [],
            })  # fmt: skip
    if finished:
        summary: dict[str, Any] = {
            "steps": steps,
            "tokens": steps * tokens_per_step,
            "heldout_loss": 3.0712,
            "bits_per_byte": 1.2797,
            "bigram_loss": 4.1034,
            "prompt": "import os\n",
            "sample": SAMPLE,
        }
        sink.row("summary", summary)
    sink.close()
    return run_dir


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", **shape: Any) -> Path:
        return write_run(tmp_path / name, **shape)

    return make
