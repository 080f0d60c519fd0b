"""Timelines as a figure: a lane a rank, compute above communication, idle time in grey."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kimi_pretrain.pipeline.timeline import (
    ALL_TO_ALL,
    COMPUTE,
    COPY,
    P2P,
    Interval,
    Span,
    Timeline,
    merged,
    without,
)
from kimi_pretrain.telemetry import style
from kimi_pretrain.telemetry.quantities import percent
from kimi_pretrain.telemetry.trace import nodes

FORWARD, BACKWARD, WEIGHT = style.BLUE, style.GREEN, "#E69F00"
HIDDEN, EXPOSED, MESSAGE, COPIED = "#a9b4bf", style.VERMILION, "#8f5a86", "#56B4E9"
IDLE = "#eff1f3"
_COLOUR = {"F": FORWARD, "I": BACKWARD, "B": BACKWARD, "W": WEIGHT}
_ACTION = re.compile(r"(\d+)(F|I|B|W)(\d+)")

# Inches. A lane is one unit of y high: compute from the top, then a row each for what is there.
_WIDTHS, _NODE = (15.0, 26.0), 0.17  # least and most, and a node's share of it
_LANE, _FRAME = 0.5, 1.25
_GAP, _ROW = 0.14, 0.13
_LARGEST, _SMALLEST = 7.5, 4.0  # points of a microbatch's number
_PALE = 0.72  # share of white
_DIGIT, _LINE = 0.66, 1.25  # width and height of a digit by the size of its font

_Box = tuple[float, float, float, float]  # start, end, bottom, top


def draw_trace(timelines: Sequence[Timeline], path: Path) -> None:
    """Draws ``timelines`` of the same step (as planned, as measured) one above the other."""
    lanes = [len(timeline.ranks) for timeline in timelines]
    width = min(_WIDTHS[1], max(_WIDTHS[0], _NODE * max(map(_crowd, timelines))))
    lane = _LANE * (1.0 if max(lanes) > 8 else 1.35)
    height = sum(lanes) * lane + _FRAME + 0.45 * len(timelines)
    with style.drawing(width, height, path) as figure:
        axes = figure.subplots(len(timelines), 1, squeeze=False, height_ratios=lanes, sharex=True)[
            :, 0
        ]
        end = max(timeline.seconds for timeline in timelines)
        found: dict[str, str] = {}
        for panel, timeline in zip(axes, timelines, strict=True):
            found |= _Panel(panel, timeline, end, width, lane).draw()
        _time_axis(axes[-1], end)
        for panel in axes[:-1]:
            panel.tick_params(bottom=False, labelbottom=False)
        _legend(figure, found, shaded=any(map(_shaded, timelines)))


class _Panel:
    """One timeline on a pair of axes: boxes are collected by colour, then drawn at once."""

    def __init__(
        self, axes: Axes, timeline: Timeline, end: float, width: float, lane: float
    ) -> None:
        self.axes, self.timeline, self.end = axes, timeline, end
        # About what the layout leaves, in points: good enough to see what text fits.
        self.second = (width - 1.1) * 72 / end if end else 0.0
        self.unit = lane * 72
        # Edges between nodes of a few points would hide the nodes.
        self.crowded = width * 72 < 4.0 * _crowd(timeline)
        self.boxes: defaultdict[str, list[_Box]] = defaultdict(list)
        used = {interval.resource for rank in timeline.ranks for interval in rank}
        self.rows = [resource for resource in (ALL_TO_ALL, P2P, COPY) if resource in used]
        self.bottom = _GAP + _ROW * len(self.rows)
        numbers = [
            m for rank in timeline.ranks for i in rank for _, _, m in _ACTION.findall(i.node)
        ]
        self.digits = max(map(len, numbers), default=1)

    def draw(self) -> dict[str, str]:
        """Returns the label and the colour of all that it drew."""
        labels: dict[str, str] = {}
        for rank in range(len(self.timeline.ranks)):
            labels |= self._rank(rank)
        for colour, boxes in self.boxes.items():
            corners = [[(a, y), (b, y), (b, top), (a, top)] for a, b, y, top in boxes]
            bare = colour in (IDLE, HIDDEN, EXPOSED, MESSAGE, COPIED) or self.crowded
            self.axes.add_collection(
                PolyCollection(
                    corners,
                    facecolors=colour,
                    edgecolors="none" if bare else "white",
                    linewidths=0.35,
                    snap=not bare,  # what is narrower than a pixel must not round to nothing
                    zorder=1 if colour == IDLE else 2,
                )
            )
        ranks = len(self.timeline.ranks)
        self.axes.set_xlim(0.0, self.end or 1.0)
        self.axes.set_ylim(ranks + 0.05, 0.0)
        self.axes.set_yticks([rank + 0.5 for rank in range(ranks)])
        self.axes.set_yticklabels([f"rank {rank}" for rank in range(ranks)])
        self.axes.grid(visible=False)
        self.axes.spines[["left", "bottom"]].set_visible(False)
        self.axes.set_title(_title(self.timeline))
        return labels

    def _rank(self, rank: int) -> dict[str, str]:
        intervals = self.timeline.ranks[rank]
        top, bottom = rank + _GAP / 2, rank + 1 - self.bottom + _GAP / 2
        self.boxes[IDLE].append((0.0, self.timeline.seconds, top, bottom))
        labels = {"idle": IDLE}
        compute = [interval for interval in intervals if interval.resource == COMPUTE]
        chunks = _chunks(compute)
        for node in nodes(compute):
            labels |= self._node(node, chunks, top, bottom)
        for row, resource in enumerate(self.rows):
            y = bottom + row * _ROW
            inner = y + 0.02, y + _ROW
            if resource == ALL_TO_ALL:
                exposed = self.timeline.exposed(rank)
                hidden = without(self.timeline.spans(rank, ALL_TO_ALL), exposed)
                self._spans(HIDDEN, hidden, *inner)
                self._spans(EXPOSED, exposed, *inner)
                labels |= {"all-to-all": HIDDEN} if hidden else {}
                labels |= {"all-to-all, exposed": EXPOSED} if exposed else {}
            else:
                colour = MESSAGE if resource == P2P else COPIED
                self._spans(colour, self.timeline.spans(rank, resource), *inner)
                labels["message sent" if resource == P2P else "offload, prefetch"] = colour
        return labels

    def _node(
        self, node: list[Interval], chunks: dict[int, float], top: float, bottom: float
    ) -> dict[str, str]:
        """One action over the lane's height, a pair as two halves: forward above backward."""
        labels = {}
        actions = _ACTION.findall(node[0].node)
        spans = merged((interval.start, interval.end) for interval in node)
        half = (bottom - top) / len(actions)
        for row, (stage, kind, microbatch) in enumerate(actions):
            colour = _tint(_COLOUR[kind], chunks[int(stage)])
            y = top + row * half
            # Pale where the action waits for its communication: no bubble, but no work either.
            self.boxes[_tint(colour, _PALE)].append((spans[0][0], spans[-1][1], y, y + half))
            self._spans(colour, spans, y, y + half)
            self._number(microbatch, spans, y, half, colour)
            labels[_NAMES[kind]] = _COLOUR[kind]
        return labels

    def _number(
        self, text: str, spans: Sequence[Span], y: float, height: float, colour: str
    ) -> None:
        """The microbatch, where the node's longest stretch has room for it."""
        start, end = max(spans, key=lambda span: span[1] - span[0])
        size = min(
            _LARGEST,
            (end - start) * self.second / (_DIGIT * self.digits + 0.2),
            height * self.unit / _LINE,
        )
        if size >= _SMALLEST:
            self.axes.text(
                (start + end) / 2,
                y + height / 2,
                text,
                fontsize=size,
                color=style.INK if sum(to_rgb(colour)) > 1.75 else "white",
                ha="center",
                va="center_baseline",
                zorder=3,
            )

    def _spans(self, colour: str, spans: Iterable[Span], top: float, bottom: float) -> None:
        self.boxes[colour] += [(start, end, top, bottom) for start, end in spans]


_NAMES = {
    "F": "forward",
    "I": "backward",
    "B": "backward",
    "W": "weight gradient",
}


def _chunks(compute: Iterable[Interval]) -> dict[int, float]:
    """Each stage of a rank, the share of white in its colours: the later, the lighter."""
    stages = {int(stage) for i in compute for stage, _, _ in _ACTION.findall(i.node)}
    return {stage: 0.6 * place / len(stages) for place, stage in enumerate(sorted(stages))}


def _crowd(timeline: Timeline) -> int:
    """The most nodes of one rank."""
    return max(len({interval.node for interval in rank}) for rank in timeline.ranks)


def _shaded(timeline: Timeline) -> bool:
    """Whether a rank holds more than one stage."""
    return any(len(_chunks(rank)) > 1 for rank in timeline.ranks)


def _tint(colour: str, white: float) -> str:
    red, green, blue = (part + (1.0 - part) * white for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _title(timeline: Timeline) -> str:
    """The step and what of it is bubble, means over the ranks."""
    factor, unit = _unit(timeline.seconds)
    parts = {"all-to-all": timeline.exposed_all_to_all, "messages": timeline.exposed_p2p}
    exposed = [
        f"{percent(sum(seconds) / len(seconds) / timeline.seconds)} exposed {what}"
        for what, seconds in parts.items()
        if any(seconds)
    ]
    of_it = f" ({', '.join(exposed)})" if exposed else ""
    time = f"{timeline.seconds * factor:.4g} {unit}"
    return f"{timeline.name}: step {time}, bubble {percent(timeline.bubble)}{of_it}"


def _unit(seconds: float) -> tuple[float, str]:
    """How many of a unit a second is, and the unit in which ``seconds`` reads well."""
    return (1.0, "s") if seconds >= 1.0 else (1e3, "ms") if seconds >= 1e-2 else (1e6, "µs")


def _time_axis(axes: Axes, end: float) -> None:
    factor, unit = _unit(end)
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * factor:g}"))
    axes.set_xlabel(unit)


def _legend(figure: Figure, found: dict[str, str], *, shaded: bool) -> None:
    order = [
        "forward",
        "backward",
        "weight gradient",
        "all-to-all",
        "all-to-all, exposed",
        "message sent",
        "offload, prefetch",
        "idle",
    ]
    patches = [
        Patch(facecolor=found[label], label=label, edgecolor="#c4cad0", linewidth=0.4)
        for label in order
        if label in found
    ]
    if shaded:
        patches.append(Patch(visible=False, label="a rank's later stages are lighter"))
    figure.legend(handles=patches, loc="outside lower center", ncol=len(patches))
