"""A layout report as text of at most 100 columns, or as plain data for JSON."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from kimi_pretrain.plan.layout_report import LayoutReport, Owned, StageReport, Work

WIDTH = 100
_LABEL, _CELL = 32, 17
_OWNERS = 6  # shown of each stage
_UNITS = ("", "k", "M", "G", "T", "P", "E")

# label -> what stands in a stage's column
_ROWS: tuple[tuple[str, Callable[[StageReport], str]], ...] = (
    ("layers", lambda s: _layers(s)),  # noqa: PLW0108 - it stands below
    ("parameters on a rank", lambda s: si(s.parameters)),
    ("  bf16 parameters", lambda s: f"{si(s.parameter_bytes)}B"),
    ("  fp32 gradients", lambda s: f"{si(s.gradient_bytes)}B"),
    ("  ZeRO-1 state", lambda s: f"{si(s.state_bytes)}B"),
    ("buffers / elements, experts", lambda s: f"{s.expert_padding:.4f}"),
    ("  dense matrices", lambda s: f"{s.dense_padding:.4f}"),
    ("dense matrices", lambda s: f"{len(s.owners)} {s.dense_sharding}"),
    ("buckets", lambda s: str(sum(s.buckets.values()))),
    ("sent a step and rank", lambda s: f"{si(_sent(s))}B"),
    ("  reduce-scatter, fp32", lambda s: f"{si(s.reduce_scatter_bytes)}B"),
    ("  all-gather, bf16", lambda s: f"{si(s.all_gather_bytes)}B"),
    ("  exchange, bf16: mean", lambda s: f"{si(s.exchange_bytes_mean)}B"),
    ("  exchange, bf16: most", lambda s: f"{si(s.exchange_bytes_most)}B"),
    ("expert matrices lent", lambda s: f"{s.expert_matrices_lent:,} of {s.expert_matrices:,}"),
    ("Newton-Schulz FLOPs: most", lambda s: si(s.newton_schulz.most)),
    ("  mean", lambda s: si(s.newton_schulz.mean)),
    ("  most / mean", lambda s: f"{s.newton_schulz.imbalance:.3f}"),
    ("  largest matrix / mean", lambda s: f"{_bound(s.newton_schulz):.3f}"),
)


def layout_lines(report: LayoutReport) -> Iterator[str]:
    """The report as lines: a column for each kind of stage, owners, the whole run."""
    t = report.topology
    yield f"{report.model} on {t.world:,} ranks = edp {t.edp} x pp {t.pp} x ep {t.ep}; dp {t.dp}"
    yield ""
    per_line = (WIDTH - _LABEL) // _CELL
    for first in range(0, len(report.stages), per_line):
        yield from _table(report, report.stages[first : first + per_line])
        yield ""
    yield "owners of the costliest dense matrices: rank of the stage's dp group (edp, ep)"
    for stage in report.stages:
        for owned in stage.owners[:_OWNERS]:
            yield f"  {f'stage {stage.stages[0]}':9} {_matrix(owned):64} {_place(owned, t.ep)}"
        left = len(stage.owners) - _OWNERS
        if left > 0:
            yield f"  {f'stage {stage.stages[0]}':9} {left} more: --json"
    yield ""
    yield from _whole(report)


def layout_data(report: LayoutReport) -> dict[str, Any]:
    """The report as what JSON can hold, every owner included."""
    topology = report.topology
    return {
        "model": report.model,
        "world": topology.world,
        **asdict(topology),
        "dp": topology.dp,
        "parameters": report.parameters,
        "held_bytes": report.held_bytes,
        "newton_schulz": _work_data(report.newton_schulz) | {"total": report.newton_schulz_total},
        "stages": [
            asdict(stage) | {"newton_schulz": _work_data(stage.newton_schulz)}
            for stage in report.stages
        ],
    }


def si(value: float) -> str:
    """Four digits and a decimal prefix: 28919857152 as ``28.92 G``."""
    power = 0
    while abs(value) >= 999.95 and power < len(_UNITS) - 1:
        value /= 1000
        power += 1
    text = f"{value:.4g}" if power else f"{value:.0f}"
    return f"{text} {_UNITS[power]}"


def _table(report: LayoutReport, stages: tuple[StageReport, ...]) -> Iterator[str]:
    def line(label: str, cells: Iterator[str]) -> str:
        return label.ljust(_LABEL) + "".join(cell.strip().rjust(_CELL) for cell in cells)

    yield line("", (_stages(s) for s in stages))
    for label, cell in _ROWS:
        yield line(label, (cell(s) for s in stages))
    busiest = report.newton_schulz.most
    shares = (f"{s.newton_schulz.most / busiest if busiest else 1.0:.3f}" for s in stages)
    yield line("  most / busiest of all stages", shares)


def _whole(report: LayoutReport) -> Iterator[str]:
    work, t = report.newton_schulz, report.topology
    yield (
        f"all ranks: {report.parameters:,} parameters; {si(report.held_bytes)}B of parameters, "
        "gradients and state"
    )
    yield (
        f"Newton-Schulz: {report.newton_schulz_total:.3g} FLOPs a step; the busiest of "
        f"{t.world:,} ranks takes {work.imbalance:.3f} times the mean"
    )


def _work_data(work: Work) -> dict[str, float]:
    return asdict(work) | {"imbalance": work.imbalance}


def _bound(work: Work) -> float:
    return work.largest_matrix / work.mean if work.mean else 0.0


def _sent(stage: StageReport) -> float:
    return stage.reduce_scatter_bytes + stage.all_gather_bytes + stage.exchange_bytes_mean


def _layers(stage: StageReport) -> str:
    """The layers of one rank, of its virtual stages too; of several ranks how many each."""
    own = stage.layers[: len(stage.layers) // len(stage.stages)]
    if len(stage.stages) == 1:
        return ", ".join(_span(first, last) for first, last in own)
    return f"{sum(last - first + 1 for first, last in own)} each"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _stages(stage: StageReport) -> str:
    numbers = stage.stages
    word = "stage" if len(stage.layers) == len(numbers) else "rank"
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    whole = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f"{word}s {_span(numbers[0], numbers[-1])}" if whole else f"{len(numbers)} {word}s"


def _matrix(owned: Owned) -> str:
    stacked = f"[{owned.index}]" if owned.name.endswith("gate_up_proj") else ""
    return f"{owned.name}{stacked} {owned.rows} x {owned.cols}"


def _place(owned: Owned, ep: int) -> str:
    edp_index, ep_index = divmod(owned.owner, ep)
    return f"{owned.owner:>5} ({edp_index}, {ep_index})"
