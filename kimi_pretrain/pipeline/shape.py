"""The shape of a pipeline: what its three numbers must satisfy, and where the stages lie."""

from kimi_pretrain.config.errors import ConfigError


def check_shape(pp: int, vpp: int, microbatches: int, group_size: int | None = None) -> None:
    """Refuses numbers that no schedule exists for.

    Raises:
        ConfigError: one of them is below 1, or a group is smaller than ``pp``.
    """
    numbers = {"parallel.pp": pp, "parallel.vpp": vpp, "microbatches": microbatches}
    for what, number in numbers.items():
        if number < 1:
            raise ConfigError(what, number, "at least 1", f"{what}=1")
    if group_size is not None and group_size < pp:
        rule = f"a group has at least as many microbatches as there are ranks ({pp})"
        raise ConfigError("group_size", group_size, rule, f"group_size={pp}")


def looped_placement(pp: int, vpp: int) -> tuple[int, ...]:
    """[pp * vpp] the rank of each stage: round and round."""
    return tuple(range(pp)) * vpp


def v_placement(pp: int) -> tuple[int, ...]:
    """[2 * pp] the rank of each stage: there and back."""
    return (*range(pp), *reversed(range(pp)))
