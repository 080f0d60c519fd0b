"""What happens inside the layers: attention logits by head, load by expert."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.lines import Line2D

from kimi_pretrain.telemetry import style
from kimi_pretrain.telemetry.plots import curve, finish
from kimi_pretrain.telemetry.recorded import Array, Heads, Load, Recorded

# With more heads than this a line for each is not readable: then one a layer.
_HEAD_LINES = 512
# Pixels of a heat map, which is as much as a figure can show of it.
_ROWS, _COLUMNS = 1000, 1000


def max_logit(axes: Axes, run: Recorded) -> None:
    """The largest attention logit of every head, coloured by layer, and tau.

    Exact at evaluations; each training step gives the largest of all heads, which below tau
    is an upper bound.
    """
    heads = run.heads
    highest = run.steps["max_logit"]
    if heads is None or heads.exact:
        curve(axes, run, "max_logit", style.MUTED, "bound", smoothed=False, linewidth=1.1)
    if heads is not None:
        _head_lines(axes, heads)
        highest = np.concatenate([highest, heads.logits.reshape(-1)])
    if run.tau is not None:
        _tau_line(axes, run.tau)
        _scale_to_tau(axes, highest, run.tau)
    axes.set_title("Max logit")
    axes.set_ylabel("attention logit")
    finish(axes, run)


def head_map(axes: Axes, run: Recorded, heads: Heads) -> None:
    """The largest logit of every head over time, layers from top to bottom."""
    finite = heads.logits[np.isfinite(heads.logits)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    _bands(
        axes,
        heads.steps,
        heads.logits,
        what="heads",
        names=[f"layer {index}" for index in range(heads.logits.shape[1])],
        norm=Normalize(min(0.0, low), high),
        colours=style.ORDERED,
        label="max logit" if heads.exact else "bound on max logit",
    )
    axes.set_title("Max logit by head")
    finish(axes, run)


def expert_load(axes: Axes, run: Recorded, load: Load) -> None:
    """Every expert's share of its layer's tokens over time, as a multiple of an even share."""
    with np.errstate(divide="ignore"):
        doublings = np.log2(load.ratio).clip(-2.0, 2.0)
    _bands(
        axes,
        load.steps,
        doublings,
        what="experts",
        names=[f"layer {load.first_layer + index}" for index in range(load.ratio.shape[1])],
        norm=TwoSlopeNorm(0.0, -2.0, 2.0),
        colours=style.BALANCE,
        label="load / even share",
        ticks={-2.0: "¼", -1.0: "½", 0.0: "1", 1.0: "2", 2.0: "4"},
    )
    axes.set_title("Expert load")
    finish(axes, run)


def _tau_line(axes: Axes, tau: float) -> None:
    line: dict[str, Any] = {"color": style.VERMILION, "linestyle": style.DASHED, "zorder": 3}
    axes.axhline(tau, linewidth=1.4, **line)
    # Named beside the frame, where no curve passes.
    right = axes.get_yaxis_transform()
    axes.text(1.012, tau, "tau", color=style.VERMILION, va="center", transform=right)


def _head_lines(axes: Axes, heads: Heads) -> None:
    logits = np.where(np.isfinite(heads.logits), heads.logits, np.nan)
    _, number, members = logits.shape
    if number * members > _HEAD_LINES:
        logits = np.fmax.reduce(logits, axis=2, keepdims=True)
    colours = matplotlib.colormaps[style.ORDERED](np.linspace(0.0, 0.88, number))
    thin: dict[str, Any] = (
        {"linewidth": 1.0, "alpha": 0.75} if number * members <= 64 else style.RAW
    )
    mark: dict[str, Any] = {"marker": "o", "markersize": 3.0} if len(heads.steps) < 3 else {}
    for layer in range(number):
        axes.plot(
            heads.steps, logits[:, layer], color=colours[layer], clip_on=False, **thin, **mark
        )
    for layer in sorted({0, number - 1}):
        axes.add_line(Line2D([], [], color=colours[layer], label=f"layer {layer}"))


def _scale_to_tau(axes: Axes, values: Array, tau: float) -> None:
    """Shows the curves and tau in one frame; far below tau, on a logarithmic scale."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return
    high = max(tau, float(finite.max()))
    if float(finite.max()) >= tau / 2:
        axes.set_ylim(min(0.0, float(finite.min())), 1.08 * high)
        return
    low = float(finite.min())
    if low >= 1.0:
        style.log_axis(axes, 0.7 * low, 1.5 * high)
        axes.set_ylim(0.7 * low, 1.5 * high)
    else:
        axes.set_yscale("symlog", linthresh=1.0, linscale=0.5)
        axes.yaxis.set_major_formatter(style.TICK)
        axes.set_ylim(min(0.0, 1.5 * low), 1.5 * high)


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
    condensed = values.shape[1] * values.shape[2] > _ROWS
    if condensed:
        values = _condense(values, max(2, _ROWS // bands))
    members = values.shape[2]
    # A row stands for the steps since the one before it.
    first = steps[0] - (float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0)
    middle = first + (np.arange(_COLUMNS) + 0.5) / _COLUMNS * (steps[-1] - first)
    pixels = values[np.searchsorted(steps, middle)].reshape(_COLUMNS, -1).T
    image = axes.imshow(
        np.where(np.isfinite(pixels), pixels, np.nan),
        norm=norm,
        cmap=colours,
        extent=(first, steps[-1], float(bands * members), 0.0),
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
