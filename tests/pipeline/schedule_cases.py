"""Shapes of pipelines for property tests, and what torch's own schedules can be compared with."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Action, Kind, Schedule, leaves
from kimi_pretrain.pipeline.schedules import GENERATORS, generate

PINNED_TORCH = "2.13"  # its pipelining.schedules is private: other versions may differ
needs_pinned_torch = pytest.mark.skipif(
    not torch.__version__.startswith(f"{PINNED_TORCH}."),
    reason=f"oracle from the private schedules of torch {PINNED_TORCH}, not {torch.__version__}",
)

shapes = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 20))  # pp, vpp, mb


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """What any generator makes of any shape it does not refuse."""
    name = draw(st.sampled_from(sorted(GENERATORS)))
    pp, vpp, microbatches = draw(shapes)
    if name == "1f1b":
        vpp = 1
    elif name == "dualpipe_v":
        vpp, microbatches = 2, 2 * pp + microbatches - 1
    return generate(name, pp, vpp, microbatches)


def small_schedules() -> Iterator[Schedule]:
    """Every generator at each of some shapes, where it does not refuse."""
    for name in GENERATORS:
        for pp, vpp, microbatches in ((1, 1, 2), (2, 1, 3), (2, 2, 4), (3, 2, 7), (4, 2, 8)):
            try:
                yield generate(name, pp, vpp, microbatches)
            except ConfigError:
                continue


def row_text(schedule: Schedule, rank: int) -> str:
    return schedule.to_text()[rank]


def actions(schedule: Schedule, rank: int) -> list[Action]:
    return [leaf for node in schedule.ranks[rank] for leaf in leaves(node)]


def forwards_first(schedule: Schedule, rank: int) -> int:
    """Forwards before the first backward that is no half of a pair: the warm-up and one more."""
    kinds = [leaves(node)[-1].kind for node in schedule.ranks[rank]]
    return next(index for index, kind in enumerate(kinds) if kind is not Kind.F)
