"""Figures are tested on their axes, which is where a wrong curve shows, and once as files."""

import base64
import json
import re
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry import layer_plots, plots, style
from kimi_pretrain.telemetry.recorded import Recorded, read_run
from kimi_pretrain.telemetry.report import write_report

MakeRun = Callable[..., Path]
FIGURES = {"loss", "learning_rate", "grad_norm", "throughput", "max_logit", "overview"}


@pytest.fixture
def axes() -> Axes:
    return Figure().subplots()


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


class Page(HTMLParser):
    """Collects what a page would load or run, its text, and whether its tags balance."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_becomes_one_page_and_its_figures(make_run: MakeRun) -> None:
    run_dir = make_run("a<b>&c", steps=120, experts=16)
    page = write_report(run_dir)
    assert page == run_dir / "report" / "index.html"
    assert {path.stem for path in page.parent.glob("*.png")} == FIGURES | {"expert_load"}
    assert all(min(png_size(path)) > 400 for path in page.parent.glob("*.png"))
    assert png_size(page.parent / "overview.png")[0] >= 1500, "too coarse for a README"

    html = page.read_text()
    parsed = Page(html)
    # Nothing is loaded and nothing runs, whatever the run's texts contain.
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    sources = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert len(sources) == 6
    for source in sources:
        assert source is not None
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    assert "a<b>&c" in parsed.text
    assert "return '<script>alert(1)</script>' & \ufffd[31m\ufffd x" in parsed.text
    assert re.search(r"[\x00-\x08\x0b-\x1f]", html) is None
    for figure in ("3.0712", "4.1034", "1.2797", "finished at step 120", "983k"):
        assert figure in parsed.text


def test_a_dense_run_that_was_killed_has_no_load_and_is_not_called_finished(
    make_run: MakeRun,
) -> None:
    run_dir = make_run(
        steps=30, experts=0, tau=None, evaluate_every=0, layers_every=0, finished=False
    )
    (run_dir / "report").mkdir()
    (run_dir / "report" / "expert_load.png").write_bytes(b"of an earlier run")
    page = write_report(run_dir)
    assert {path.stem for path in page.parent.glob("*.png")} == FIGURES
    text = Page(page.read_text()).text
    assert "at step 30, not finished" in text
    assert "Sample" not in text
    assert "bigram model" not in text.partition("Loss")[0]


def test_one_step_is_enough(make_run: MakeRun) -> None:
    """Singular axis limits, divisions by the run's length, empty slices."""
    run_dir = make_run(steps=1, layers_every=1, experts=4, evaluate_every=1, finished=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first, "a report is a function of the files"


def test_losses_that_are_not_finite_are_gaps_and_are_told(make_run: MakeRun) -> None:
    run_dir = make_run(steps=8, finished=False)
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[5:]:
        row |= {"loss": float("nan"), "grad_norm": float("inf"), "max_logit": float("-inf")}
        row |= {"tokens_per_second": None, "mfu": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "3 of its losses not finite" in write_report(run_dir).read_text()


def test_what_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drawing_changes_nothing_of_the_users_own_plots(make_run: MakeRun, tmp_path: Path) -> None:
    keys = ("font.size", "axes.grid", "text.parse_math", "savefig.facecolor")
    before = [matplotlib.rcParams[key] for key in keys]
    with style.drawing(5.0, 3.0, tmp_path / "figure.png") as figure:
        plots.learning_rate(figure.subplots(), read_run(make_run(steps=5)))
    assert [matplotlib.rcParams[key] for key in keys] == before


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}


def test_the_loss_figure_has_train_held_out_and_bigram(make_run: MakeRun, axes: Axes) -> None:
    run = read_run(make_run(steps=60))
    plots.loss(axes, run)
    np.testing.assert_array_equal(lines(axes)["train"], run.steps["loss"])
    np.testing.assert_array_equal(lines(axes)["held-out"], run.evals["heldout_loss"])
    assert set(lines(axes)["bigram"]) == {4.1034}


def test_long_curves_keep_their_spikes(
    make_run: MakeRun, axes: Axes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every n-th point drawn: a loss spike of one step vanishes from the figure."""
    monkeypatch.setattr(plots, "_POINTS", 40)
    run = read_run(make_run(steps=400, layers_every=0))
    run.steps.columns["loss"][217] = 50.0
    plots.loss(axes, run)
    raw = np.asarray(axes.get_lines()[0].get_ydata())
    assert raw.max() == 50.0
    assert len(raw) <= 40


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 7.0])
def test_tau_and_every_head_are_inside_the_frame(
    make_run: MakeRun, axes: Axes, scale: float
) -> None:
    """A tau far above the curves, curves above tau, negative logits: cut off by the axis."""
    run = read_run(make_run(steps=40, logit_scale=scale, evaluate_every=4))
    layer_plots.max_logit(axes, run)
    low, high = axes.get_ylim()
    drawn = [np.asarray(line.get_ydata()) for line in axes.get_lines()]
    heads = [values for values in drawn if len(values) == 10]
    assert len(heads) == 16
    assert low <= min(values.min() for values in heads)
    assert high >= max(100.0, *(values.max() for values in heads))
    assert sum(len(values) == 2 and set(values) == {100.0} for values in drawn) == 1
    assert "tau" in [text.get_text() for text in axes.texts]
    np.testing.assert_array_equal(lines(axes)["bound"], run.steps["max_logit"])


def test_the_load_map_has_one_band_a_layer_named_by_its_place_in_the_model(
    make_run: MakeRun, axes: Axes
) -> None:
    """Rows of expert_load start at the first MoE layer, which is layer 1, not 0."""
    run = read_run(make_run(steps=40, experts=8, layers_every=4))
    assert run.load is not None
    layer_plots.expert_load(axes, run, run.load)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["layer 1", "layer 2", "layer 3"]
    (image,) = axes.get_images()
    assert list(image.get_extent()) == [0.0, 40.0, 24.0, 0.0]
    pixels = np.asarray(image.get_array())
    expected = np.log2(run.load.ratio.reshape(10, 24)).clip(-2, 2).T
    # Every row stands for its own step and the three before it.
    np.testing.assert_allclose(pixels[:, 50::100], expected)


def test_a_map_too_tall_for_its_pixels_keeps_the_extremes(
    make_run: MakeRun, axes: Axes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged neighbours: 384 experts a layer that look balanced while some starve."""
    monkeypatch.setattr(layer_plots, "_ROWS", 12)
    run = read_run(make_run(steps=10, experts=64, layers_every=2))
    assert run.load is not None
    layer_plots.expert_load(axes, run, run.load)
    pixels = np.asarray(axes.get_images()[0].get_array()).reshape(3, 4, -1)
    assert (np.diff(pixels, axis=1) <= 0).all()
    assert (pixels[:, 0] > 0.4).all()
    assert (pixels[:, -1] < -0.4).all()


def test_every_axis_is_labelled(make_run: MakeRun) -> None:
    run = read_run(make_run(steps=40, experts=8, evaluate_every=4))
    heads, load = run.heads, run.load
    assert heads is not None
    assert load is not None
    rows: list[Callable[[Axes, Recorded], None]] = [
        plots.loss,
        plots.learning_rate,
        plots.grad_norm,
        plots.throughput,
        layer_plots.max_logit,
        plots.clipped_heads,
        lambda axes, run: layer_plots.head_map(axes, run, heads),
        lambda axes, run: layer_plots.expert_load(axes, run, load),
    ]
    for draw in rows:
        axes = Figure().subplots()
        draw(axes, run)
        assert axes.get_xlabel().startswith("step")
        assert axes.get_ylabel(), axes.get_title("left")


@pytest.mark.parametrize(
    ("draw", "layers"),
    [
        (plots.loss, 4),
        (plots.grad_norm, 4),
        (layer_plots.max_logit, 4),
        (layer_plots.max_logit, 12),
    ],
)
def test_no_legend_touches_its_title_or_a_curve(
    make_run: MakeRun, tmp_path: Path, draw: Callable[[Axes, Recorded], None], layers: int
) -> None:
    run = read_run(make_run(steps=40, layers=layers, experts=8, evaluate_every=4))
    # Half of the overview is the narrowest that any panel gets.
    with style.drawing(5.0, 3.1, tmp_path / "figure.png") as figure:
        axes = figure.subplots()
        draw(axes, run)
    legend = axes.get_legend()
    assert legend is not None
    box = legend.get_window_extent()
    assert box.x0 > axes._left_title.get_window_extent().x1
    assert box.y0 >= axes.get_window_extent().y1
