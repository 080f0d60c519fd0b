"""The learning rate as a closed form of the step: a list of stages, warm-up to anneal.

Kimi K2 (arXiv 2507.20534, section 2.5) warms up over 500 steps, holds 2e-4 for 10T tokens,
decays by a cosine to 2e-5 over 5.5T and anneals to 7e-6: warm-up, stable, decay (WSD). Here
that is one list; a stage is counted in tokens or in steps and says which fraction of the
peak it ends at. Nothing is accumulated, so a resume needs the step only. No torch import.
"""

import math
from collections.abc import Callable

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ScheduleConfig, StageConfig

# (fraction at the stage's start, at its end, progress in (0, 1]) -> fraction of the peak
_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, x: start + (end - start) * x,
    "constant": lambda start, end, x: end,
    "cosine": lambda start, end, x: end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * x)),
}


def stage_steps(stage: StageConfig, tokens_per_step: int) -> int:
    """Length of one stage in optimizer steps; tokens are rounded to the nearest whole step.

    Raises:
        ConfigError: tokens and steps both or neither given, or shorter than one step.
    """
    if (stage.tokens is None) == (stage.steps is None):
        raise ConfigError(
            f"schedule stage {stage.name}",
            {"tokens": stage.tokens, "steps": stage.steps},
            "a stage is counted in tokens or in steps, exactly one of them",
            "steps=100",
        )
    if stage.tokens is not None:
        steps = (2 * stage.tokens + tokens_per_step) // (2 * tokens_per_step)
    else:
        steps = stage.steps or 0
    if steps < 1:
        raise ConfigError(
            f"schedule stage {stage.name}",
            stage.tokens if stage.tokens is not None else stage.steps,
            f"a stage lasts at least one step of {tokens_per_step} tokens",
            f"tokens={tokens_per_step}",
        )
    return steps


def total_steps(cfg: ScheduleConfig, tokens_per_step: int) -> int:
    """Steps of the whole run: the stages' sum, or `max_steps` where that comes first.

    Raises:
        ConfigError: no stages, an impossible stage, or max_steps below one.
    """
    stages = sum(stage_steps(stage, tokens_per_step) for stage in _stages(cfg))
    if cfg.max_steps is None:
        return stages
    if cfg.max_steps < 1:
        raise ConfigError("schedule.max_steps", cfg.max_steps, "a run has at least one step", "1")
    return min(cfg.max_steps, stages)


def learning_rate(
    cfg: ScheduleConfig, optimizer_lr: float, tokens_per_step: int, step: int
) -> float:
    """The learning rate with which 0-based `step` updates the weights.

    It is the schedule's value where the step ends: a warm-up of N steps gives peak/N to the
    first and the peak to the N-th, every stage's last step has the stage's `to`, and no step
    is wasted on a rate of zero. The first stage starts from 0; a constant stage is at its
    `to` throughout; after the last stage its `to` stays.

    Args:
        cfg: the stages.
        optimizer_lr: the peak, of which stages give fractions.
        tokens_per_step: tokens of one optimizer step.
        step: number of steps done before this one.

    Raises:
        ConfigError: no stages, an impossible stage or an unknown shape.
        ValueError: a negative step.
    """
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}")
    first, start = 0, 0.0
    for stage in _stages(cfg):
        if stage.shape not in _SHAPES:
            raise ConfigError(
                f"shape of schedule stage {stage.name}",
                stage.shape,
                f"a shape is one of {', '.join(_SHAPES)}",
                "linear",
            )
        length = stage_steps(stage, tokens_per_step)
        if step < first + length:
            progress = (step + 1 - first) / length
            return optimizer_lr * _SHAPES[stage.shape](start, stage.to, progress)
        first, start = first + length, stage.to
    return optimizer_lr * start


def _stages(cfg: ScheduleConfig) -> list[StageConfig]:
    if not cfg.stages:
        raise ConfigError(
            "schedule.stages",
            [],
            "a schedule has at least one stage",
            "[{name: stable, shape: constant, steps: 100}]",
        )
    return cfg.stages
