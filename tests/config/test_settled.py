"""What a configuration leaves open is decided before it is checked."""

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.settled import micro_batch_size


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([], 8),
        (["parallel.dp=4"], 2),
        (["parallel.dp=4", "schedule.micro_batch_size=1"], 1),
        (["parallel.pp=2", "parallel.schedule=k2"], 1),
        (["parallel.vpp=2", "parallel.schedule=k2"], 1),
        (["schedule.global_batch_size=24", "parallel.dp=2"], 12),
    ],
)
def test_a_microbatch_is_a_replicas_share_or_one_sequence_of_a_pipeline(
    overrides: list[str], size: int
) -> None:
    """Catches a default that any other number of replicas makes impossible."""
    assert micro_batch_size(compose(overrides)) == size
