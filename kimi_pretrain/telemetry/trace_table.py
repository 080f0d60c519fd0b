"""A timeline in numbers, one row a rank."""

from kimi_pretrain.pipeline.timeline import Timeline
from kimi_pretrain.telemetry.quantities import percent

_HEADER = ("rank", "compute", "bubble", "exposed all-to-all", "exposed messages", "peak held")


def trace_lines(timeline: Timeline) -> list[str]:
    """The step in one line, then a table: seconds in ms, activations as stages (layers)."""
    facts = [f"step {_ms(timeline.seconds)} ms", f"bubble {percent(timeline.bubble)}"]
    if timeline.critical_path is not None:
        facts.append(f"one microbatch alone {_ms(timeline.critical_path)} ms")
    rows = [_HEADER]
    for rank, bubble in enumerate(timeline.bubbles):
        peak = timeline.peaks[rank] if timeline.peaks else None
        rows.append(
            (
                str(rank),
                f"{_ms(timeline.busy[rank])} ms",
                percent(bubble),
                f"{_ms(timeline.exposed_all_to_all[rank])} ms",
                f"{_ms(timeline.exposed_p2p[rank])} ms",
                f"{peak.stages} ({peak.layers} layers)" if peak else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return [f"{timeline.name}: {', '.join(facts)}", *table]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 1.0 else f"{seconds * 1e3:.1f}"
