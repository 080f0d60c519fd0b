"""Rows of numbers a run leaves behind, made from what a step or an evaluation measured.

Pure functions from results to plain dictionaries; `telemetry` decides where they go.
The fields are listed in docs/watching.md.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.telemetry.breakdown import part_fields
from kimi_pretrain.train.evaluate import Evaluation
from kimi_pretrain.train.step import StepResult


def step_row(
    result: StepResult,
    *,
    step: int,
    tokens_per_step: int,
    learning_rate: float,
    parts: Mapping[str, float],
    checkpoint_seconds: float,
    goodput: float,
    flops_per_token: int,
    peak_flops: float,
    clipped_heads: float,
) -> dict[str, Any]:
    """One row of metrics.jsonl; `step` counts finished steps, so the first row is step 1."""
    record, seconds = result.record, sum(parts.values())
    rate = tokens_per_step / seconds
    return {
        "step": step,
        "tokens": step * tokens_per_step,
        "loss": result.loss,
        "aux_loss": float(record.aux_loss.sum()) * record.aux_scale,
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm,
        "max_logit": float(record.max_logits.max()),
        "clipped_heads": clipped_heads,
        "load_max_over_mean": _load_max_over_mean(record),
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token / peak_flops,
        **part_fields(parts),
        "checkpoint_seconds": checkpoint_seconds,
        "goodput": goodput,
        **_moved_fields(result),
    }


def _moved_fields(result: StepResult) -> dict[str, int]:
    if result.moved is None:
        return {}
    return {"offloaded_bytes": result.moved.out, "not_offloaded_bytes": result.moved.stayed}


def layers_row(step: int, record: StepRecord, tau: float | None) -> dict[str, Any]:
    """One row of layers.jsonl: arrays by layer, and by head or expert."""
    clipped = record.exact & (record.max_logits > (float("inf") if tau is None else tau))
    counts = record.expert_counts.double()  # [moe layers, experts]
    return {
        "step": step,
        "max_logits": record.max_logits.tolist(),
        "exact": record.exact.tolist(),
        "clipped": clipped.tolist(),
        "expert_load": (counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)).tolist(),
    }


def evaluation_row(step: int, tokens: int, evaluation: Evaluation) -> dict[str, Any]:
    """One row of evals.jsonl."""
    return {
        "step": step,
        "tokens": tokens,
        "heldout_loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "domains": evaluation.domain_losses,
        "max_logits": evaluation.max_logits.tolist(),
    }


def _load_max_over_mean(record: StepRecord) -> float:
    counts: Tensor = record.expert_counts.double()
    if counts.numel() == 0:
        return 1.0
    return float((counts.amax(dim=-1) / counts.mean(dim=-1).clamp_min(1e-9)).max())
