"""The figures of a report, each a function from a recorded run to a pair of axes."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kimi_pretrain.telemetry import style
from kimi_pretrain.telemetry.quantities import count
from kimi_pretrain.telemetry.recorded import Array, Layers, Recorded

# Beyond these a legend of layers or a line for each head is not readable.
_LEGEND_LAYERS, _HEAD_LINES = 6, 512
# The most points of a curve that a figure can show.
_POINTS = 4000
# Shorter runs are drawn as they are: there is nothing to smooth.
_FEW = 100
# Rows of a heat map that a figure can show.
_BAND_ROWS = 1000


def loss(axes: Axes, run: Recorded) -> None:
    """Training loss, raw and smoothed, held-out loss, and a bigram model's."""
    _curve(axes, run, "loss", style.BLUE, "train")
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
    _finish(axes, run, label)


def learning_rate(axes: Axes, run: Recorded) -> None:
    """The learning rate of every step."""
    _curve(axes, run, "learning_rate", style.BLUE, None, smoothed=False)
    axes.set_title("Learning rate")
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(style.TICK)
    axes.set_ylim(bottom=0.0)
    _finish(axes, run)


def grad_norm(axes: Axes, run: Recorded) -> None:
    """The global gradient norm before clipping, and where clipping begins."""
    _curve(axes, run, "grad_norm", style.BLUE, "before clipping")
    limit = run.config["optimizer"]["grad_clip"]
    if limit is not None:
        axes.axhline(limit, color=style.INK, linewidth=1.1, linestyle=style.DASHED, label="limit")
    axes.set_title("Gradient norm")
    axes.set_ylabel("global L2 norm")
    norms = run.steps["grad_norm"]
    norms = norms[np.isfinite(norms)]
    if norms.size:
        style.log_axis(axes, float(norms.min()), float(norms.max()))
    _finish(axes, run)


def throughput(axes: Axes, run: Recorded) -> None:
    """Tokens a second; on the right the same curve as model FLOPs utilisation."""
    rate, mfu = run.steps["tokens_per_second"], run.steps["mfu"]
    steps = run.steps["step"]
    if len(steps) < _FEW:
        _curve(axes, run, "tokens_per_second", style.GREEN, None)
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
    _finish(axes, run)


def max_logit(axes: Axes, run: Recorded) -> None:
    """The largest attention logit of every head, coloured by layer, below tau."""
    layers = run.layers
    if layers is None:
        _curve(axes, run, "max_logit", style.BLUE, "largest of all heads", smoothed=False)
        highest = run.steps["max_logit"]
    else:
        _head_lines(axes, layers)
        highest = layers.max_logits
    if run.tau is not None:
        axes.axhline(
            run.tau,
            color=style.VERMILION,
            linewidth=1.4,
            linestyle=style.DASHED,
            zorder=3,
        )
        axes.text(
            1.012,
            run.tau,
            "tau",
            color=style.VERMILION,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        _scale_to_tau(axes, highest, run.tau)
    axes.set_title("Max logit")
    axes.set_ylabel("attention logit")
    _finish(axes, run)


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
    _finish(axes, run)


def head_map(axes: Axes, run: Recorded, layers: Layers) -> None:
    """The largest logit of every head over time, layers from top to bottom."""
    finite = layers.max_logits[np.isfinite(layers.max_logits)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    _bands(
        axes,
        layers.steps,
        layers.max_logits,
        what="heads",
        names=[f"layer {index}" for index in range(layers.max_logits.shape[1])],
        norm=Normalize(min(0.0, low), high),
        colours=style.ORDERED,
        label="max logit",
    )
    axes.set_title("Max logit by head")
    _finish(axes, run)


def expert_load(axes: Axes, run: Recorded, layers: Layers) -> None:
    """Every expert's share of its layer's tokens over time, as a multiple of an even share."""
    dense = run.config["model"]["first_k_dense_replace"]
    with np.errstate(divide="ignore"):
        ratio = np.log2(layers.load).clip(-2.0, 2.0)
    _bands(
        axes,
        layers.steps,
        ratio,
        what="experts",
        names=[f"layer {dense + index}" for index in range(layers.load.shape[1])],
        norm=TwoSlopeNorm(0.0, -2.0, 2.0),
        colours=style.BALANCE,
        label="load / even share",
        ticks={-2.0: "¼", -1.0: "½", 0.0: "1", 1.0: "2", 2.0: "4"},
    )
    axes.set_title("Expert load")
    _finish(axes, run)


def _curve(
    axes: Axes, run: Recorded, key: str, colour: str, label: str | None, *, smoothed: bool = True
) -> None:
    """A column of metrics.jsonl: raw and thin, with its smoothed self above."""
    steps, values = run.steps["step"], run.steps[key]
    values = np.where(np.isfinite(values), values, np.nan)
    mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(steps) < 3 else {}
    few = len(steps) < _FEW or not smoothed
    if not few:
        axes.plot(*_extremes(steps, values), color=colour, **style.RAW)
        values = style.smooth(values)
    stride = max(1, len(steps) // _POINTS)
    shown = np.union1d(np.arange(0, len(steps), stride), [len(steps) - 1])
    axes.plot(steps[shown], values[shown], color=colour, label=label, **style.SMOOTH, **mark)


def _extremes(steps: Array, values: Array) -> tuple[Array, Array]:
    """A long curve by the lowest and highest value of each of _POINTS / 2 stretches."""
    if len(steps) <= _POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _POINTS // 2 + 1).astype(int)[:-1]
    low, high = np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)
    return np.repeat(steps[edges], 2), np.stack([low, high], axis=1).reshape(-1)


def _head_lines(axes: Axes, layers: Layers) -> None:
    logits = np.where(np.isfinite(layers.max_logits), layers.max_logits, np.nan)
    _, number, heads = logits.shape
    if number * heads > _HEAD_LINES:
        logits = np.fmax.reduce(logits, axis=2, keepdims=True)
    colours = matplotlib.colormaps[style.ORDERED](np.linspace(0.0, 0.88, number))
    thin: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.75} if number * heads <= 64 else style.RAW
    mark: dict[str, Any] = {"marker": "o", "markersize": 3.0} if len(layers.steps) < 3 else {}
    for layer in range(number):
        axes.plot(layers.steps, logits[:, layer], color=colours[layer], **thin, **mark)
    named = range(number) if number <= _LEGEND_LAYERS else (0, number - 1)
    for layer in named:
        label = f"layer {layer}" if layer == 0 or number > _LEGEND_LAYERS else f"{layer}"
        axes.add_line(Line2D([], [], color=colours[layer], label=label))


def _scale_to_tau(axes: Axes, values: Array, tau: float) -> None:
    """Shows the curves and tau in one frame; far below tau, on a logarithmic scale."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return
    high = max(tau, float(finite.max()))
    if float(finite.max()) >= tau / 4:
        axes.set_ylim(min(0.0, float(finite.min())), 1.08 * high)
        return
    low = float(finite.min())
    if low > 0:
        style.log_axis(axes, 0.7 * low, 1.5 * high)
        axes.set_ylim(0.7 * low, 1.5 * high)
    else:
        axes.set_yscale("symlog", linthresh=1.0, linscale=0.5)
        axes.yaxis.set_major_formatter(style.TICK)
        axes.set_ylim(1.5 * low, 1.5 * high)


def _bands(
    axes: Axes,
    steps: Array,
    values: Array,
    *,
    what: str,
    names: list[str],
    norm: Normalize,
    colours: str,
    label: str,
    ticks: dict[float, str] | None = None,
) -> None:
    """A heat map of [time, layer, member]: one band a layer, members from top to bottom.

    With more members than a figure has rows, each moment's members are sorted and condensed:
    a picture that averaged neighbours would show every layer as balanced.
    """
    bands = values.shape[1]
    condensed = values.shape[1] * values.shape[2] > _BAND_ROWS
    if condensed:
        values = _condense(values, max(2, _BAND_ROWS // bands))
    members = values.shape[2]
    grid = np.linspace(steps[0], steps[-1], min(len(steps), 1000))
    nearest = np.abs(steps[None, :] - grid[:, None]).argmin(axis=1)
    pixels = np.where(np.isfinite(values), values, np.nan)[nearest].reshape(len(grid), -1).T
    # A row stands for the steps since the one before it; alone, for its own step.
    column = grid[1] - grid[0] if len(grid) > 1 else 1.0
    last = grid[-1] if len(grid) > 1 else grid[-1] + 0.5
    image = axes.imshow(
        pixels,
        norm=norm,
        cmap=colours,
        extent=(last - column * len(grid), last, float(bands * members), 0.0),
    )
    for band in range(1, bands if bands <= 12 else 1):
        axes.axhline(band * members, color="white", linewidth=1.5)
    shown = np.arange(0, bands, -(-bands // 8))
    axes.set_yticks((shown + 0.5) * members, [names[band] for band in shown])
    axes.set_ylabel(f"{what} of each layer{', sorted' if condensed else ''}")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    figure = axes.figure
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=25, label=label)
    bar.outline.set_visible(False)
    if ticks is not None:
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.minorticks_off()


def _condense(values: Array, rows: int) -> Array:
    """[time, layer, member] to [time, layer, rows]: means of neighbours in falling order."""
    ordered = -np.sort(-values, axis=2)
    parts = np.array_split(ordered, min(rows, values.shape[2]), axis=2)
    return np.stack([part.mean(axis=2) for part in parts], axis=2)


def _finish(axes: Axes, run: Recorded, label: str = "step") -> None:
    steps = run.steps["step"]
    style.steps_axis(axes, float(steps[0]), float(steps[-1]), label)
    style.legend_above(axes)
