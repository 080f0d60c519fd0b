"""One step of a run measured on every rank of one pipeline (docs/trace.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_pretrain.parallel.clocks import clock_offset
from kimi_pretrain.parallel.world import World
from kimi_pretrain.pipeline.execute import Executor
from kimi_pretrain.pipeline.timeline import TraceRows


@contextmanager
def traced(executor: Executor, world: World, directory: Path) -> Iterator[None]:
    """Write what this rank does meanwhile to ``directory``, if it is of the first replica.

    Ranks are numbered as in their pipeline and their clocks are those of its first. Rows are
    written after the step, which they would slow down.

    Raises:
        PeerError: another rank of the pipeline did not answer.
    """
    if world.dp.index != 0:
        yield
        return
    if world.pp.index == 0:
        for old in directory.glob("rank-*.jsonl"):  # perhaps of more ranks
            old.unlink()
    offset = clock_offset(world.pp)  # nobody writes before the first rank has come here
    rows: list[tuple[str, str, str, float, float]] = []
    executor.observe = lambda *row: rows.append(row)
    try:
        yield
    finally:
        executor.observe = None
    with TraceRows(directory, world.pp.index, offset) as file:
        for row in rows:
            file.add(*row)
