"""One look for every figure: ink on white, two accents, nothing that is not data.

Colours are Okabe and Ito's (2008), which people with any colour vision tell apart, with
viridis where order matters and a blue-red scale where a middle does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from kimi_pretrain.telemetry.quantities import tick
from kimi_pretrain.telemetry.recorded import Array

INK = "#1f2328"
MUTED = "#6e7781"
GRID = "#e6e8eb"
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
ORDERED = "viridis"
BALANCE = "RdBu_r"

TICK = FuncFormatter(lambda value, _: tick(value))
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
DASHED = (0, (5, 3))
RAW: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.3}
SMOOTH: dict[str, Any] = {"linewidth": 1.8}

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "text.color": INK,
    "text.parse_math": False,  # names of domains and models are not formulas
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.0,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlepad": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.0,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.3,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "image.aspect": "auto",
}
_DPI = 160


@contextmanager
def drawing(width: float, height: float, path: Path) -> Iterator[Figure]:
    """A figure of so many inches, saved as PNG when the block ends.

    A plain ``Figure`` and no pyplot: nothing global changes, and no display is needed.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09, wspace=0.05, hspace=0.05)  # type: ignore[union-attr,call-arg]
        yield figure
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def steps_axis(axes: Axes, first: float, last: float, label: str = "step") -> None:
    """The axis all figures share; a single step gets room to stand in."""
    room = 0.5 if first == last else 0.0
    axes.set_xlim(first - room, last + room)
    if last - first < 6:
        axes.set_xticks(np.arange(first, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(TICK)
    axes.set_xlabel(label)


def legend_above(axes: Axes) -> None:
    """A legend on the title's line, at the right: no curve ever runs behind it."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.035), ncol=len(labels))


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis written out at 1, 2, 5 of every decade, where it spans enough."""
    if not 0.0 < 5.0 * low < high:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(TICK)


def smooth(values: Array, share: float = 0.02) -> Array:
    """A centred moving average over ``share`` of the run, without lag.

    At the start the window shrinks on both sides, lest the steep first steps be dragged
    upwards; at the end, where a curve is flat and noise is all, only ahead. Values that are
    not finite are left out, and stay gaps.
    """
    index = np.arange(len(values))
    half = np.minimum(max(4, int(share * len(values) / 2)), index)
    first, last = index - half, np.minimum(index + half + 1, len(values))
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    mean = (total[last] - total[first]) / np.maximum(1, number[last] - number[first])
    return np.where(finite, mean, np.nan)


def medians(steps: Array, values: Array, pieces: int = 100) -> Array:
    """[2, pieces]: the middle step and the median value of each piece of the run.

    For times, whose outliers (a first step, a pause of the machine) say nothing of the rest.
    """
    parts = zip(
        np.array_split(steps, min(pieces, len(steps))),
        np.array_split(values, min(pieces, len(values))),
        strict=True,
    )
    return np.array([(step.mean(), np.median(part)) for step, part in parts]).T
