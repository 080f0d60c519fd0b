"""A run on one page: figures as PNG files, and an HTML page that holds them all."""

import logging
from collections.abc import Iterator
from pathlib import Path

from kimi_pretrain.telemetry.recorded import Recorded, read_run


def write_report(run_dir: Path) -> Path:
    """Draws ``run_dir/report`` from the files of the run alone; returns its index.html.

    The page needs nothing but itself. Beside it lie the figures as PNG files, of which
    ``overview.png`` shows four at a README's width. A run that is going on or was killed
    gets the figures that its rows allow.

    Raises:
        ConfigError: ``run_dir`` is no directory of a run with at least one step.
    """
    from kimi_pretrain.telemetry.page import render

    # matplotlib tells at its first use that it looks for fonts; Hydra's root logger prints that.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    run = read_run(run_dir)
    directory = run_dir / "report"
    directory.mkdir(exist_ok=True)
    for stale in directory.glob("*.png"):
        stale.unlink()
    figures = dict(_draw(run, directory))
    page = directory / "index.html"
    page.write_text(render(run, figures), encoding="utf-8")
    return page


def _draw(run: Recorded, directory: Path) -> Iterator[tuple[str, Path]]:
    """Yields each figure's name and file; matplotlib is imported when there is one to draw."""
    from kimi_pretrain.telemetry import layer_plots, plots, style

    def path(name: str) -> tuple[str, Path]:
        return name, directory / f"{name}.png"

    for name, draw, size in (
        ("loss", plots.loss, (9.6, 4.4)),
        ("learning_rate", plots.learning_rate, (5.6, 3.6)),
        ("grad_norm", plots.grad_norm, (5.6, 3.6)),
        ("throughput", plots.throughput, (9.6, 3.2)),
    ):
        with style.drawing(*size, path(name)[1]) as figure:
            draw(figure.subplots(), run)
        yield path(name)

    heads, load = run.heads, run.load
    panels = 2 if heads is None else 3
    with style.drawing(9.6, 2.4 + 2.4 * panels, path("max_logit")[1]) as figure:
        axes = figure.subplots(panels, 1, height_ratios=[3, 1.2, 3][:panels])
        layer_plots.max_logit(axes[0], run)
        plots.clipped_heads(axes[1], run)
        if heads is not None:
            layer_plots.head_map(axes[2], run, heads)
        for above in axes[:-1]:
            above.set_xlabel("")
    yield path("max_logit")

    if load is not None:
        height = min(14.0, 2.2 + 1.3 * load.ratio.shape[1])
        with style.drawing(9.6, height, path("expert_load")[1]) as figure:
            layer_plots.expert_load(figure.subplots(), run, load)
        yield path("expert_load")

    with style.drawing(10.0, 6.2, path("overview")[1]) as figure:
        axes = figure.subplots(2, 2)
        plots.loss(axes[0, 0], run)
        layer_plots.max_logit(axes[0, 1], run)
        if load is not None:
            layer_plots.expert_load(axes[1, 0], run, load)
        else:
            plots.learning_rate(axes[1, 0], run)
        plots.throughput(axes[1, 1], run)
    yield path("overview")
