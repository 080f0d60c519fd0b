"""The pipeline schedule of a run, made and checked before anything is started. No torch."""

from kimi_pretrain.config.schema import Config
from kimi_pretrain.pipeline.actions import Action, Kind, Schedule
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.verify import verify
from kimi_pretrain.plan.run_schedule import named_schedule, with_messages
from kimi_pretrain.plan.stages import split_layers


def training_schedule(config: Config) -> Schedule:
    """What every rank does in a step, sends and receives included.

    Raises:
        ConfigError: no such schedule for this shape, a file of one that cannot run, or more
            stages than layers.
    """
    stages_of(config)
    schedule = named_schedule(config)
    _refuse_offloads(schedule)
    schedule = with_messages(schedule)
    verify(schedule)
    return schedule


def stages_of(config: Config) -> list[range]:
    """The layers of every virtual stage.

    Raises:
        ConfigError: more stages than layers.
    """
    return split_layers(config.model, config.parallel)


def _refuse_offloads(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.ranks):
        for position, node in enumerate(row):
            if isinstance(node, Action) and node.kind in (Kind.OFFLOAD, Kind.PREFETCH):
                rule = "this version keeps activations on the device"
                raise ScheduleError(
                    schedule.name, rank, position, str(node), rule, "leaving offloads out"
                )
