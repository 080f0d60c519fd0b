"""Curves over the steps of a run, each a function from a recorded run to a pair of axes."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kimi_pretrain.telemetry import style
from kimi_pretrain.telemetry.quantities import count
from kimi_pretrain.telemetry.recorded import Array, Recorded

# The most points of a curve that a figure can show.
_POINTS = 4000
# Shorter runs are drawn as they are: there is nothing to smooth.
_FEW = 100


def loss(axes: Axes, run: Recorded) -> None:
    """Training loss, raw and smoothed, held-out loss, and a bigram model's."""
    curve(axes, run, "loss", style.BLUE, "train")
    if run.evals.has("heldout_loss"):
        axes.plot(
            run.evals["step"],
            run.evals["heldout_loss"],
            color=style.VERMILION,
            marker="o",
            markersize=3.5,
            markevery=max(1, run.evals.rows // 25),
            linewidth=1.2,
            clip_on=False,
            zorder=3,
            label="held-out",
        )
    bigram = (run.summary or {}).get("bigram_loss")
    if bigram is not None:
        axes.axhline(bigram, color=style.INK, linewidth=1.1, linestyle=style.DASHED, label="bigram")
    axes.set_title("Loss")
    axes.set_ylabel("nats per token")
    each = run.steps["tokens"][-1] / run.steps["step"][-1]
    label = f"step ({count(each)} tokens each)" if np.isfinite(each) else "step"
    finish(axes, run, label)


def learning_rate(axes: Axes, run: Recorded) -> None:
    """The learning rate of every step."""
    curve(axes, run, "learning_rate", style.BLUE, None, smoothed=False)
    axes.set_title("Learning rate")
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(style.TICK)
    axes.set_ylim(bottom=0.0)
    finish(axes, run)


def grad_norm(axes: Axes, run: Recorded) -> None:
    """The global gradient norm before clipping, and where clipping begins."""
    curve(axes, run, "grad_norm", style.BLUE, "before clipping")
    limit = run.config["optimizer"]["grad_clip"]
    if limit is not None:
        axes.axhline(limit, color=style.INK, linewidth=1.1, linestyle=style.DASHED, label="limit")
    axes.set_title("Gradient norm")
    axes.set_ylabel("global L2 norm")
    norms = run.steps["grad_norm"]
    norms = norms[np.isfinite(norms)]
    if norms.size:
        style.log_axis(axes, float(norms.min()), float(norms.max()))
    finish(axes, run)


def throughput(axes: Axes, run: Recorded) -> None:
    """Tokens a second; on the right the same curve as model FLOPs utilisation."""
    rate, mfu = run.steps["tokens_per_second"], run.steps["mfu"]
    steps = run.steps["step"]
    if len(steps) < _FEW:
        curve(axes, run, "tokens_per_second", style.GREEN, None)
    else:
        axes.plot(*_extremes(steps, rate), color=style.GREEN, **style.RAW)
        axes.plot(*style.medians(steps, rate), color=style.GREEN, **style.SMOOTH)
    axes.set_title("Throughput")
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(style.TICK)
    finite = rate[np.isfinite(rate)]
    axes.set_ylim(0.0, 1.2 * float(np.percentile(finite, 99)) if finite.size else 1.0)
    if run.steps.has("mfu"):
        # Utilisation is the rate times a constant of the model and the machine.
        share = float(np.nanmedian(mfu / rate))

        def utilisation(tokens: Any) -> Any:
            return tokens * share

        def tokens(utilisation: Any) -> Any:
            return utilisation / share

        right = axes.secondary_yaxis("right", functions=(utilisation, tokens))
        right.set_ylabel("MFU")
        right.yaxis.set_major_formatter(style.PERCENT)
        right.spines["right"].set_visible(False)
    finish(axes, run)


def clipped_heads(axes: Axes, run: Recorded) -> None:
    """The share of all heads that QK-Clip scaled down, step by step."""
    steps, share = run.steps["step"], run.steps["clipped_heads"]
    axes.fill_between(steps, 0.0, share, color=style.VERMILION, alpha=0.25, linewidth=0)
    axes.plot(steps, share, color=style.VERMILION, linewidth=1.0)
    highest = float(np.nanmax(share)) if run.steps.has("clipped_heads") else 0.0
    axes.set_ylim(0.0, max(0.05, 1.15 * highest))
    if highest == 0.0:
        axes.text(
            0.5,
            0.5,
            "none" if run.tau is not None else "QK-Clip is off",
            color=style.MUTED,
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
    axes.yaxis.set_major_formatter(style.PERCENT)
    axes.set_title("Heads clipped")
    axes.set_ylabel("share")
    finish(axes, run)


def curve(
    axes: Axes,
    run: Recorded,
    key: str,
    colour: str,
    label: str | None,
    *,
    smoothed: bool = True,
    linewidth: float = 1.8,
) -> None:
    """Draws a column of metrics.jsonl: raw and thin, with its smoothed self above."""
    steps, values = run.steps["step"], run.steps[key]
    values = np.where(np.isfinite(values), values, np.nan)
    mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(steps) < 3 else {}
    few = len(steps) < _FEW or not smoothed
    if not few:
        axes.plot(*_extremes(steps, values), color=colour, **style.RAW)
        values = style.smooth(values)
    stride = max(1, len(steps) // _POINTS)
    shown = np.union1d(np.arange(0, len(steps), stride), [len(steps) - 1])
    axes.plot(steps[shown], values[shown], color=colour, label=label, linewidth=linewidth, **mark)


def _extremes(steps: Array, values: Array) -> tuple[Array, Array]:
    """A long curve by the lowest and highest value of each of _POINTS / 2 stretches."""
    if len(steps) <= _POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _POINTS // 2 + 1).astype(int)[:-1]
    low, high = np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)
    return np.repeat(steps[edges], 2), np.stack([low, high], axis=1).reshape(-1)


def finish(axes: Axes, run: Recorded, label: str = "step") -> None:
    """What every panel has: the axis of the run's steps, and its legend."""
    steps = run.steps["step"]
    style.steps_axis(axes, float(steps[0]), float(steps[-1]), label)
    style.legend_above(axes)
