"""The pipeline schedule of a run, made and checked before anything is started. No torch."""

from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.pipeline.actions import Action, Kind, Schedule
from kimi_pretrain.pipeline.errors import ScheduleError
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import generate, one_f_one_b
from kimi_pretrain.pipeline.transfers import has_p2p
from kimi_pretrain.pipeline.verify import verify
from kimi_pretrain.plan.stages import split_layers


def microbatches_of(config: Config) -> int:
    """Microbatches of one replica in one step."""
    return config.schedule.global_batch_size // (micro_batch_size(config) * config.parallel.dp)


def training_schedule(config: Config) -> Schedule:
    """What every rank does in a step, sends and receives included.

    Raises:
        ConfigError: no such schedule for this shape, a file of one that cannot run, or more
            stages than layers.
    """
    parallel, microbatches = config.parallel, microbatches_of(config)
    stages_of(config)
    if parallel.schedule_file is not None:
        schedule = _read(Path(parallel.schedule_file), config)
    elif parallel.schedule == "none":
        schedule = one_f_one_b(1, 1, microbatches)
    else:
        schedule = generate(parallel.schedule, parallel.pp, parallel.vpp, microbatches)
    if not has_p2p(schedule):
        schedule = insert_p2p(schedule)
    verify(schedule)
    return schedule


def stages_of(config: Config) -> list[range]:
    """The layers of every virtual stage.

    Raises:
        ConfigError: more stages than layers.
    """
    return split_layers(config.model, config.parallel)


def _read(path: Path, config: Config) -> Schedule:
    key = "parallel.schedule_file"
    try:
        rows = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"it is a readable text file ({error})"
        raise ConfigError(key, str(path), rule, "parallel.schedule=k2") from error
    schedule = Schedule.from_text([row for row in rows if row.strip()], path.name)
    parallel = config.parallel
    have = (schedule.pp, schedule.vpp, schedule.microbatches)
    want = (parallel.pp, parallel.vpp, microbatches_of(config))
    if have != want:
        rule = "its ranks, stages a rank and microbatches are the run's, {} x {} x {}"
        fix = f"parallel.pp={have[0]} parallel.vpp={have[1]} and {have[2]} microbatches"
        raise ConfigError(key, "{} x {} x {}".format(*have), rule.format(*want), fix)
    verify(schedule)  # before messages are put in: positions are the file's
    _refuse_offloads(schedule)
    return schedule


def _refuse_offloads(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.ranks):
        for position, node in enumerate(row):
            if isinstance(node, Action) and node.kind in (Kind.OFFLOAD, Kind.PREFETCH):
                rule = "this version keeps activations on the device"
                raise ScheduleError(
                    schedule.name, rank, position, str(node), rule, "leaving offloads out"
                )
