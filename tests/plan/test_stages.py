"""Which layers a stage holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.plan.stages import stage_layers


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
