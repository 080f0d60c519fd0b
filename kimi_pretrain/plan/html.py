"""A plan as one page: its text, and a picture of memory and time as inline SVG."""

from collections import defaultdict
from collections.abc import Iterator
from html import escape
from math import floor, log10

from kimi_pretrain.pipeline.timeline import COMPUTE, Timeline
from kimi_pretrain.plan.memory import COMPONENTS
from kimi_pretrain.plan.report import GB, LABELS, plan_lines
from kimi_pretrain.plan.run_plan import Plan
from kimi_pretrain.plan.shortage import Shortage

# Okabe and Ito's colours (2008), which people with any colour vision tell apart.
_MEMORY = {
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#009E73",
    "activations": "#E69F00",
    "weight_gradients": "#F0E442",
    "communication": "#CC79A7",
    "reserved": "#6e7781",
    "fragmentation": "#c8cdd2",
}
_TIME = {"F": "#0072B2", "I": "#009E73", "B": "#009E73", "W": "#E69F00", "O": "#5a6fb0"}
_TIME_LABELS = {
    "F": "forward",
    "I": "backward",
    "W": "weight gradients",
    "O": "overlapped pair",
}
_EXPOSED, _IDLE, _INK, _RED = "#D55E00", "#eff1f3", "#1f2328", "#b00020"
_WIDTH, _LEFT, _BAR, _LANE = 1120, 70, 15, 20
# Of a long step the beginning, the middle and the end are alike: the first so many nodes a rank.
_NODES = 160

_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;color:#1f2328;max-width:1160px;margin:2em auto;"
    "padding:0 1em}pre{font-size:12.5px;line-height:1.35;overflow-x:auto}h2{font-size:1.1em;"
    "margin-top:1.8em}"
)


def plan_page(plan: Plan, short: Shortage | None, budget: float) -> str:
    """A whole HTML page that loads nothing."""
    t = plan.topology
    title = escape(f"{plan.config.model.name} on {t.world:,} {plan.hardware.name}")
    text = escape("\n".join(plan_lines(plan, short, budget)))
    timeline = plan.step.timeline
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            "<h2>Memory of every pipeline rank</h2>",
            *memory_svg(plan),
            f"<h2>The beginning of a step of {plan.step.seconds:.2f} s</h2>",
            *timeline_svg(timeline, *beginning(timeline)),
            "<h2>Its end</h2>",
            *timeline_svg(timeline, *_end(timeline)),
            "<h2>The plan</h2>",
            f"<pre>{text}</pre></body></html>\n",
        ]
    )


def memory_svg(plan: Plan) -> Iterator[str]:
    """A bar a rank by component, and a line at what a GPU has."""
    limit = plan.hardware.memory_bytes
    most = 1.05 * max(limit, plan.fullest.total)
    scale = (_WIDTH - _LEFT - 60) / most
    height = len(plan.memory) * (_BAR + 4) + 44
    yield _svg(height, "memory of every pipeline rank, by component")
    yield from _legend({LABELS[name]: _MEMORY[name] for name in COMPONENTS}, 14)
    y = 28.0
    for rank in plan.memory:
        yield _text(_LEFT - 6, y + 11, f"rank {rank.rank}", "end")
        x = float(_LEFT)
        for name in COMPONENTS:
            size = getattr(rank, name)
            tip = escape(f"rank {rank.rank}: {LABELS[name]} {size / GB:.2f} GB")
            yield (
                f'<rect x="{x:.1f}" y="{y:.0f}" width="{size * scale:.1f}" height="{_BAR}" '
                f'fill="{_MEMORY[name]}"><title>{tip}</title></rect>'
            )
            x += size * scale
        yield _text(x + 4, y + 11, f"{rank.total / GB:.1f} GB", "start")
        y += _BAR + 4
    x = _LEFT + limit * scale
    yield f'<path d="M{x:.1f} 22V{y:.0f}" stroke="{_RED}" stroke-dasharray="4 3"/>'
    yield _text(x, y + 12, f"{limit / GB:g} GB", "middle")
    yield "</svg>"


def timeline_svg(timeline: Timeline, start: float, end: float) -> Iterator[str]:
    """A lane a rank from ``start`` to ``end``: nodes above, exposed all-to-all below."""
    scale = (_WIDTH - _LEFT - 10) / (end - start)
    bottom = 28 + len(timeline.ranks) * _LANE
    yield _svg(bottom + 22, "the simulated pipeline")
    yield from _legend(_shown(timeline, start, end), 14)

    def box(first: float, last: float, y: float, height: float) -> str:
        a, b = max(first, start), min(last, end)
        width = max((b - a) * scale - 0.3, 0.2)
        return f"M{_LEFT + (a - start) * scale:.1f} {y:.0f}h{width:.1f}v{height:.0f}h-{width:.1f}z"

    for rank in range(len(timeline.ranks)):
        y = 28.0 + rank * _LANE
        yield _text(_LEFT - 6, y + 12, f"rank {rank}", "end")
        yield f'<path d="{box(start, end, y, _LANE - 3)}" fill="{_IDLE}"/>'
        paths: defaultdict[str, list[str]] = defaultdict(list)
        for kind, first, last in _nodes(timeline, rank):
            if last > start and first < end:
                paths[_TIME[kind]].append(box(first, last, y, 12))
        for first, last in timeline.exposed(rank):
            if last > start and first < end:
                paths[_EXPOSED].append(box(first, last, y + 13, 4))
        for colour, parts in paths.items():
            yield f'<path d="{"".join(parts)}" fill="{colour}"/>'
    digits = max(2, 2 - floor(log10(end - start)))
    for tick in range(5):
        at = start + (end - start) * tick / 4
        x, anchor = _LEFT + (at - start) * scale, ("start", "middle", "middle", "middle", "end")
        yield _text(x, bottom + 14, f"{at:.{digits}f} s", anchor[tick])
    yield "</svg>"


def _shown(timeline: Timeline, start: float, end: float) -> dict[str, str]:
    """Label and colour of what is to be seen between ``start`` and ``end``."""
    ranks = range(len(timeline.ranks))
    nodes = [node for rank in ranks for node in _nodes(timeline, rank)]
    kinds = {kind.replace("B", "I") for kind, first, last in nodes if last > start and first < end}
    shown = {label: _TIME[kind] for kind, label in _TIME_LABELS.items() if kind in kinds}
    if any(
        last > start and first < end for rank in ranks for first, last in timeline.exposed(rank)
    ):
        shown["all-to-all exposed"] = _EXPOSED
    return shown | {"idle": _IDLE}


def beginning(timeline: Timeline, nodes: int = _NODES) -> tuple[float, float]:
    """Seconds in which a rank runs at most so many nodes."""
    most = max(1, *(sum(1 for _ in _nodes(timeline, rank)) for rank in range(len(timeline.ranks))))
    return 0.0, (timeline.seconds or 1.0) * min(1.0, nodes / most)


def _end(timeline: Timeline) -> tuple[float, float]:
    whole = timeline.seconds or 1.0
    return whole - beginning(timeline)[1], whole


def _nodes(timeline: Timeline, rank: int) -> Iterator[tuple[str, float, float]]:
    """(kind, start, end) of a rank's compute nodes; O is a pair."""
    node, kind, first, last = "", "", 0.0, 0.0
    for interval in timeline.ranks[rank]:
        if interval.resource != COMPUTE:
            continue
        if interval.node != node:
            if node:
                yield kind, first, last
            node, first = interval.node, interval.start
            pair = node.startswith("(")
            kind = "O" if pair else node.rstrip("0123456789")[-1]
        last = interval.end
    if node:
        yield kind, first, last


def _svg(height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="100%" '
        f'role="img" aria-label="{escape(label)}" style="background:#fff">'
        f"<style>text{{font:11px system-ui,sans-serif;fill:{_INK}}}</style>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(colours: dict[str, str], y: float) -> Iterator[str]:
    x = float(_LEFT)
    for label, colour in colours.items():
        yield f'<rect x="{x:.0f}" y="{y - 8:.0f}" width="10" height="10" fill="{colour}"/>'
        yield _text(x + 14, y + 1, label, "start")
        x += 26 + 6.2 * len(label)
