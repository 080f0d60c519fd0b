"""Values that a configuration leaves open and other values decide."""

from dataclasses import replace

from kimi_pretrain.config.schema import Config


def settled(config: Config) -> Config:
    """``config`` with ``schedule.micro_batch_size`` filled in where it is null.

    As large as a replica's share of the batch, which costs the fewest calls; in a pipeline one
    sequence, which leaves the smallest bubble.
    """
    schedule, parallel = config.schedule, config.parallel
    if schedule.micro_batch_size is not None:
        return config
    staged = parallel.pp * parallel.vpp > 1
    size = 1 if staged else max(1, schedule.global_batch_size // max(1, parallel.dp))
    return replace(config, schedule=replace(schedule, micro_batch_size=size))


def micro_batch_size(config: Config) -> int:
    """Sequences of a microbatch, in a settled configuration."""
    size = config.schedule.micro_batch_size
    assert size is not None
    return size
