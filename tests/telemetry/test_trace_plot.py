"""Timelines as a figure."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kimi_pretrain.pipeline.costs import Costs, Phases
from kimi_pretrain.pipeline.schedules import forward_only, gpipe, k2
from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.timeline import Timeline
from kimi_pretrain.telemetry import trace_plot
from kimi_pretrain.telemetry.trace_plot import draw_trace

PNG = b"\x89PNG"


def costs(stages: int) -> Costs:
    forward, backward = Phases(2, 1, 2, 1), Phases(2, 1, 2, 1)
    return Costs((1,) * stages, forward, backward, Phases(1, 0, 1, 0), p2p=0.5, offload=0.1)


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is drawn."""
    seen: list[Axes] = []
    subplots = Figure.subplots

    def spy(self: Figure, *arguments: object, **options: object) -> object:
        axes = subplots(self, *arguments, **options)
        seen.extend(axes.flat)
        return axes

    monkeypatch.setattr(Figure, "subplots", spy)
    return seen


def area(axes: Axes, colour: str) -> float:
    """Seconds times lanes that a colour covers, boxes that overlap counted twice."""
    total = 0.0
    for collection in axes.collections:
        assert isinstance(collection, PolyCollection)
        if to_hex(collection.get_facecolor()[0]) == colour.lower():
            for path in collection.get_paths():
                low, high = path.vertices.min(axis=0), path.vertices.max(axis=0)
                total += float((high - low).prod())
    return total


def test_boxes_are_as_long_as_the_intervals(tmp_path: Path, panels: list[Axes]) -> None:
    """Catches exposed time that is drawn as hidden, and actions drawn at another's place."""
    timeline = simulate(k2(4, 1, 8), costs(4))
    draw_trace([timeline], tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(PNG)
    (axes,) = panels
    row = trace_plot._ROW - 0.02
    exposed = sum(timeline.exposed_all_to_all)
    total = sum(
        end - start for rank in range(4) for start, end in timeline.spans(rank, "all-to-all")
    )
    assert area(axes, trace_plot.EXPOSED) == pytest.approx(exposed * row)
    assert area(axes, trace_plot.HIDDEN) == pytest.approx((total - exposed) * row)
    lane = 1.0 - trace_plot._GAP - 2 * trace_plot._ROW
    assert area(axes, trace_plot.WEIGHT) == pytest.approx(4 * 8 * 2 * lane)
    assert area(axes, trace_plot.IDLE) == pytest.approx(4 * timeline.seconds * lane)


def test_numbers_stand_where_they_fit(tmp_path: Path, panels: list[Axes]) -> None:
    """Catches numbers over each other in a large schedule, and none in a small one."""
    draw_trace([simulate(gpipe(2, 1, 4), costs(2))], tmp_path / "small.png")
    assert [text.get_text() for text in panels[0].texts] == ["0", "1", "2", "3"] * 4
    draw_trace([simulate(gpipe(2, 1, 400), costs(2))], tmp_path / "large.png")
    assert not panels[1].texts


def test_planned_above_measured_on_one_axis(tmp_path: Path, panels: list[Axes]) -> None:
    """Catches two time axes, on which a slow run looks like its plan."""
    planned = simulate(k2(2, 2, 4), costs(4))
    slow = tuple(
        tuple(i._replace(start=2 * i.start, end=2 * i.end) for i in rank) for rank in planned.ranks
    )
    draw_trace([planned, Timeline("measured", slow)], tmp_path / "trace.png")
    assert panels[0].get_xlim() == panels[1].get_xlim() == (0.0, 2 * planned.seconds)
    assert panels[0].get_title(loc="left").startswith("k2: step")
    assert panels[1].get_title(loc="left").startswith("measured: step")


@pytest.mark.parametrize("stages", [1, 3])
def test_forwards_alone(tmp_path: Path, stages: int) -> None:
    """Catches a figure that needs backwards, communication or more than one rank."""
    still = Costs.uniform(stages, 1, 1, 1)
    draw_trace([simulate(forward_only(stages, 1, 4), still)], tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(PNG)
