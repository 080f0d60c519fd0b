"""Which layers a stage holds."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.plan.stages import Loads, balanced_layers, split_layers, stage_layers


def test_k2_on_16_stages() -> None:
    """Catches 61 layers cut into 4 x 13 and 3 x 3, whose last stage holds a head as well."""
    assert [len(layers) for layers in stage_layers(61, 16)] == [4] * 15 + [1]


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_every_layer_is_in_one_stage_and_no_stage_is_empty(case: tuple[int, int]) -> None:
    """Catches ceil-first on 9 layers and 8 stages: 2 2 2 2 1 and three stages of nothing."""
    layers, stages = case
    ranges = stage_layers(layers, stages)
    assert len(ranges) == stages
    assert [index for stage in ranges for index in stage] == list(range(layers))
    sizes = [len(stage) for stage in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == -(-layers // stages)
    assert sizes[-1] >= 1


def test_more_stages_than_layers_are_refused() -> None:
    """Catches an empty stage that fails only when a rank builds it."""
    with pytest.raises(ConfigError, match=r"parallel\.pp: got 5; .* 4 layers; try parallel\.pp=4"):
        stage_layers(4, 5)


def test_the_costliest_stage_costs_least() -> None:
    """Catches the head's stage with as many layers as the others: all ranks wait for it."""
    time = Loads((0.4,) + (1.0,) * 60, 0.1, 1.9)  # K2: the first layer is dense
    sizes = [len(stage) for stage in balanced_layers(time, 16)]
    assert sizes[-1] == 2
    assert max(sizes) == 4
    assert sum(sizes) == 61
    assert [len(stage) for stage in balanced_layers(Loads((1, 1, 1, 5, 1, 1)), 3)] == [3, 1, 2]


def test_memory_decides_among_the_fastest_only() -> None:
    """Catches an embedding that takes a layer from its stage and gives it to the head's."""
    time, memory = Loads((1.0,) * 5, 0.0, 2.0), Loads((1.0,) * 5, 3.0, 0.0)
    assert [len(stage) for stage in balanced_layers(time, 3, memory)] == [1, 3, 1]
    assert [len(stage) for stage in balanced_layers(time, 3)] == [2, 2, 1]
    slow = Loads((1.0,) * 5, 0.0, 3.0)
    assert [len(stage) for stage in balanced_layers(slow, 3, Loads((1.0,) * 5, 9.0))] == [1, 3, 1]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 9),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_no_split_is_better(
    layers: list[tuple[int, int]], stages: int, first: tuple[int, int], last: tuple[int, int]
) -> None:
    """Catches a greedy split, an empty stage or a forgotten embedding or head."""
    stages = min(stages, len(layers))

    def loads(measure: int, cuts: tuple[int, ...]) -> list[int]:
        edges = (0, *cuts, len(layers))
        load = [sum(layer[measure] for layer in layers[a:b]) for a, b in pairwise(edges)]
        load[0] += first[measure]
        load[-1] += last[measure]
        return load

    def score(cuts: tuple[int, ...]) -> tuple[int, int, int]:
        time, memory = loads(0, cuts), loads(1, cuts)
        return max(time), max(memory), sum(x * x for x in time)

    time, memory = (
        Loads(tuple(layer[measure] for layer in layers), first[measure], last[measure])
        for measure in (0, 1)
    )
    ranges = balanced_layers(time, stages, memory)
    assert [index for stage in ranges for index in stage] == list(range(len(layers)))
    assert all(ranges)
    found = score(tuple(stage.stop for stage in ranges[:-1]))
    assert found == min(map(score, combinations(range(1, len(layers)), stages - 1)))


@pytest.mark.parametrize(("stages", "fix"), [(5, "4 stages"), (0, "1 stages")])
def test_balancing_more_stages_than_layers_is_refused(stages: int, fix: str) -> None:
    """Catches pp x vpp chunks of which some hold nothing."""
    with pytest.raises(ConfigError, match=f"pipeline stages: got {stages}; .* 4 layers; try {fix}"):
        balanced_layers(Loads((1.0,) * 4), stages)


@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_a_balanced_split_of_k2_gives_the_ends_less(vpp: int) -> None:
    """Catches a split by count where the head, 1.2G parameters, waits behind as many layers."""
    config = compose(["model=k2", "parallel.ep=16", "parallel.dp=16", "parallel.pp=16"])
    parallel = replace(config.parallel, vpp=vpp, layer_split="balanced")
    counts = [len(layers) for layers in split_layers(config.model, parallel)]
    assert sum(counts) == 61
    assert min(counts) >= 1
    assert counts[-1] < max(counts)
    even = replace(parallel, layer_split="even")
    assert split_layers(config.model, even) == stage_layers(61, 16 * vpp)
