"""The schedule that a run of a configuration follows, and where its stages lie."""

from dataclasses import dataclass, replace
from pathlib import Path

from kimi_pretrain.config.activation import offloads, policies
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ActivationConfig, Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.config.validate import validate_training
from kimi_pretrain.pipeline.actions import COPIES, Kind, Schedule, leaves
from kimi_pretrain.pipeline.errors import MicrobatchError
from kimi_pretrain.pipeline.passes import (
    insert_offload,
    insert_p2p,
    insert_recompute,
    limit_weight_grad,
)
from kimi_pretrain.pipeline.schedules import generate, one_f_one_b
from kimi_pretrain.pipeline.shape import looped_placement, v_placement
from kimi_pretrain.pipeline.transfers import has_p2p
from kimi_pretrain.pipeline.verify import verify
from kimi_pretrain.plan.stages import split_layers

# Schedules that put weight gradients off, and smaller parallel.weight_grads_held, the faster first.
FEWER_HELD = {"k2": (0,), "zb_h1": (1, 0), "dualpipe_v": (1, 0)}


@dataclass(frozen=True)
class RunSchedule:
    """A step's schedule with everything that depends on the number of its stages."""

    schedule: Schedule  # with messages, and offloads where the policy wants them
    layers: tuple[range, ...]  # [pp x vpp] of every stage

    def stages(self, rank: int) -> list[int]:
        """The stages of a pipeline rank, in order."""
        return [s for s, place in enumerate(self.schedule.placement) if place == rank]


def run_schedule(config: Config) -> RunSchedule:
    """What ``train`` follows with ``config``.

    Args:
        config: settled.

    Raises:
        ConfigError: a batch that does not divide, more stages than layers, no such schedule, or
            an activation policy that does not go with it.
    """
    validate_training(config)
    layers = split_layers(config.model, config.parallel)
    return RunSchedule(complete(named_schedule(config), config.activation), tuple(layers))


def steady(config: Config) -> Config:
    """The run with only as many microbatches as every rank takes to hold the most it ever does.

    A pipeline is full after fewer than four times as many as it has ranks, and does the same over
    and over until it drains; how much of a group is left over stays as it is. GPipe holds them all,
    and of a schedule from a file nothing is known.
    """
    parallel, microbatches = config.parallel, microbatches_of(config)
    few = 4 * parallel.pp + microbatches % parallel.pp
    named = parallel.schedule_file is None and parallel.schedule not in ("gpipe", "none")
    if not named or few >= microbatches:
        return config
    batch = few * micro_batch_size(config) * parallel.dp
    return replace(config, schedule=replace(config.schedule, global_batch_size=batch))


def complete(schedule: Schedule, activation: ActivationConfig) -> Schedule:
    """A schedule with its messages, and with offloads and recomputations as the policy wants them.

    What is in it already stays as it is: a file may place both itself.

    Raises:
        ConfigError: it moves or recomputes activations, and no policy does.
    """
    has = {leaf.kind for row in schedule.ranks for node in row for leaf in leaves(node)}
    chosen = policies(activation).values()
    for kinds, wanted, rule in (
        (COPIES, offloads(activation), "no tag has a policy that leaves the device"),
        ({Kind.RECOMPUTE}, any(p.recompute for p in chosen), "no tag is computed again"),
    ):
        if has & kinds and not wanted:
            key = "activation.policy"
            raise ConfigError(key, activation.policy, f"of {schedule.name}: {rule}", f"{key}=k2")
    schedule = with_messages(schedule)
    if offloads(activation) and not has & COPIES:
        schedule = insert_offload(schedule)
    if activation.ahead and Kind.RECOMPUTE not in has:
        schedule = insert_recompute(schedule)
    return schedule


def named_schedule(config: Config) -> Schedule:
    """The schedule that ``config`` names, or the one in the file that it names, within its limits.

    Args:
        config: settled.

    Raises:
        ConfigError: no such schedule for this shape, or a file of one that cannot run.
    """
    schedule, held = _named(config), config.parallel.weight_grads_held
    return schedule if held is None else limit_weight_grad(schedule, held)


def _named(config: Config) -> Schedule:
    parallel, microbatches = config.parallel, microbatches_of(config)
    if parallel.schedule_file is not None:
        return _read(Path(parallel.schedule_file), config)
    if parallel.schedule == "none":
        return one_f_one_b(1, 1, microbatches)
    try:
        return generate(parallel.schedule, parallel.pp, parallel.vpp, microbatches)
    except MicrobatchError as error:
        rule = f"it makes {microbatches} microbatches, and {error.rule}"
        key, fix = "schedule.global_batch_size", _batch_of(config, error.needed)
        raise ConfigError(key, config.schedule.global_batch_size, rule, fix) from error


def with_messages(schedule: Schedule) -> Schedule:
    """A schedule with sends and receives: those that are in it, or ours."""
    return schedule if has_p2p(schedule) else insert_p2p(schedule)


def microbatches_of(config: Config) -> int:
    """Microbatches of one replica in one step."""
    return config.schedule.global_batch_size // (micro_batch_size(config) * config.parallel.dp)


def _batch_of(config: Config, microbatches: int) -> str:
    """The nearest setting that makes so many microbatches of one replica in one step.

    Where the batch divides into as many smaller ones, it may stay as it is.
    """
    dp, size = config.parallel.dp, micro_batch_size(config)
    fix = f"schedule.global_batch_size={microbatches * size * dp}"
    smaller, rest = divmod(config.schedule.global_batch_size, microbatches * dp)
    return f"{fix}, or schedule.micro_batch_size={smaller}" if smaller and not rest else fix


def rank_stages(config: Config) -> list[list[int]]:
    """[pp] the stages of every rank, by the schedule's name alone.

    A schedule from a file says itself where stages lie; see ``RunSchedule``.
    """
    pp, vpp = config.parallel.pp, config.parallel.vpp
    folded = config.parallel.schedule == "dualpipe_v" and vpp == 2
    placement = v_placement(pp) if folded else looped_placement(pp, vpp)
    return [[s for s, place in enumerate(placement) if place == rank] for rank in range(pp)]


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
        fix = f"parallel.pp={have[0]} parallel.vpp={have[1]} {_batch_of(config, have[2])}"
        raise ConfigError(key, "{} x {} x {}".format(*have), rule.format(*want), fix)
    verify(schedule)  # before messages are put in: positions are the file's
    return schedule
