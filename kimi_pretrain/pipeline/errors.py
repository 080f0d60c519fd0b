"""What is wrong with a schedule, and where."""

from kimi_pretrain.config.errors import ConfigError


class MicrobatchError(ConfigError):
    """A schedule that wants another number of microbatches.

    Attributes:
        needed: the nearest number that it takes.
    """

    def __init__(self, microbatches: int, rule: str, needed: int) -> None:
        self.needed = needed
        super().__init__("microbatches", microbatches, rule, f"microbatches={needed}")


class ScheduleError(ConfigError):
    """A schedule that cannot be run as it stands.

    Attributes:
        rank: whose row is wrong; None where the whole schedule is.
        position: of the node in that row, from 0; None where something is absent.
    """

    def __init__(
        self,
        schedule: str,
        rank: int | None,
        position: int | None,
        value: object,
        rule: str,
        fix: str,
    ) -> None:
        self.rank = rank
        self.position = position
        where = f"schedule {schedule}"
        if rank is not None:
            where += f", rank {rank}"
        if position is not None:
            where += f", position {position}"
        super().__init__(where, value, rule, fix)
