"""Where the stages of a pipeline lie, and which shapes exist."""

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.shape import check_shape, looped_placement, v_placement


def test_stages_lie_round_and_round_or_there_and_back() -> None:
    """Catches a placement by blocks: neighbours in the model would share a rank."""
    assert looped_placement(3, 2) == (0, 1, 2, 0, 1, 2)
    assert v_placement(3) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((0, 1, 1, None), "parallel.pp"),
        ((1, 0, 1, None), "parallel.vpp"),
        ((1, 1, 0, None), "microbatches"),
        ((4, 1, 8, 3), "group_size"),
    ],
)
def test_shapes_that_nothing_exists_for(shape: tuple[int, int, int, int | None], what: str) -> None:
    """Catches an empty schedule, and a group that waits for itself to come round."""
    with pytest.raises(ConfigError) as refused:
        check_shape(*shape)
    assert refused.value.what == what
