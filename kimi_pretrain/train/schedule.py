"""The pipeline schedule of a run, made and checked before anything is started. No torch."""

from kimi_pretrain.config.schema import Config
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.verify import verify
from kimi_pretrain.plan.run_schedule import complete, named_schedule
from kimi_pretrain.plan.stages import split_layers


def training_schedule(config: Config) -> Schedule:
    """What every rank does in a step: sends and receives, offloads and their return included.

    Raises:
        ConfigError: no such schedule for this shape, a file of one that cannot run, or more
            stages than layers.
    """
    stages_of(config)
    schedule = complete(named_schedule(config), config.activation)
    verify(schedule)
    return schedule


def stages_of(config: Config) -> list[range]:
    """The layers of every virtual stage.

    Raises:
        ConfigError: more stages than layers.
    """
    return split_layers(config.model, config.parallel)
