"""What refusals of the pipeline carry besides their line."""

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.errors import MicrobatchError, ScheduleError


def test_a_schedule_error_says_where() -> None:
    """Catches a refusal of 50,000 nodes that leaves open which one, or names position 0 as none."""
    error = ScheduleError("mine", 0, 0, "0B0", "it waits", "another order")
    assert isinstance(error, ConfigError)
    assert (error.rank, error.position) == (0, 0)
    assert str(error) == "schedule mine, rank 0, position 0: got '0B0'; it waits; try another order"
    whole = ScheduleError("mine", None, None, 3, "rule", "fix")
    assert whole.what == "schedule mine"


def test_a_microbatch_error_says_how_many() -> None:
    """Catches a number that only the text has, where a caller puts it into a key of its own."""
    assert MicrobatchError(2, "too few", 8).needed == 8
