"""The pipeline schedule of a run, made and checked before anything is started. No torch."""

from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import generate, one_f_one_b
from kimi_pretrain.pipeline.verify import verify
from kimi_pretrain.plan.stages import stage_layers


def microbatches_of(config: Config) -> int:
    """Microbatches of one replica in one step."""
    return config.schedule.global_batch_size // (micro_batch_size(config) * config.parallel.dp)


def training_schedule(config: Config) -> Schedule:
    """What every rank does in a step, sends and receives included.

    Raises:
        ConfigError: no such schedule for this shape, or more stages than layers.
    """
    parallel, microbatches = config.parallel, microbatches_of(config)
    stages_of(config)
    if parallel.schedule == "none":
        schedule = one_f_one_b(1, 1, microbatches)
    else:
        schedule = generate(parallel.schedule, parallel.pp, parallel.vpp, microbatches)
    schedule = insert_p2p(schedule)
    verify(schedule)
    return schedule


def stages_of(config: Config) -> list[range]:
    """The layers of every virtual stage.

    Raises:
        ConfigError: more stages than layers.
    """
    parallel = config.parallel
    return stage_layers(config.model.num_hidden_layers, parallel.pp * parallel.vpp)
