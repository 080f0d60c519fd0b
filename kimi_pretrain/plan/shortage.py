"""What to do about a plan that does not fit: by how much, where, and the cheapest change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.plan.bound import most_tokens
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.memory import COMPONENTS, RankMemory, rank_memory, static_without_padding
from kimi_pretrain.plan.run_plan import fits
from kimi_pretrain.plan.run_schedule import FEWER_HELD, run_schedule, steady

NEAR = 1.1  # GPU-hours that differ by less than this are about the same


@dataclass(frozen=True)
class Change:
    """Overrides that make a run fit."""

    overrides: tuple[str, ...]
    costs: str  # what they cost, in words
    total: float  # bytes that the fullest rank then holds
    gpus: int
    gpu_hours: float  # a token's, over those of the plan that does not fit; both by their bound


@dataclass(frozen=True)
class Shortage:
    """A pipeline rank that lacks memory the most."""

    rank: int
    place: str  # GPU | host
    over: float  # bytes
    largest: str  # component
    changes: tuple[Change, ...]  # the cheapest, and the cheapest on the same GPUs if that differs


@dataclass(frozen=True)
class _Step:
    override: str
    costs: str
    apply: Callable[[Config], Config]


def shortage(config: Config, memory: Sequence[RankMemory]) -> Shortage | None:
    """What a run lacks whose ranks hold ``memory``, [pp]; None where it fits."""
    hardware = Hardware.of(config.cluster)
    if fits(memory, hardware):
        return None

    def over(rank: RankMemory) -> float:
        host = rank.host - hardware.host_memory_bytes
        return max(rank.total - hardware.memory_bytes, host)

    worst = max(memory, key=over)
    on_gpu = worst.total - hardware.memory_bytes >= worst.host - hardware.host_memory_bytes
    largest = max(COMPONENTS, key=lambda name: float(getattr(worst, name)))
    place = "GPU" if on_gpu else "host"
    what = largest if on_gpu else "activations"
    return Shortage(worst.rank, place, over(worst), what, cheapest_changes(config))


def cheapest_changes(config: Config) -> tuple[Change, ...]:
    """The change that makes a run fit for the fewest GPU-hours, and that on no more GPUs.

    Pairs of changes are tried where no single one fits, or none does on the same GPUs. GPU-hours
    are compared by what a run takes at least (``bound``); within 10 % fewer GPUs win.
    """
    hardware = Hardware.of(config.cluster)
    before = most_tokens(config, hardware)
    world = config.parallel.pp * config.parallel.dp
    single = list(_steps(config))
    found: list[Change] = []
    for steps in ([(step,) for step in single], list(combinations(single, 2))):
        found += [
            change for chosen in steps for change in _fitting(config, chosen, hardware, before)
        ]
        if any(change.gpus <= world for change in found):
            break
    if not found:
        return ()

    cheapest = _cheapest(found)
    same = [change for change in found if change.gpus <= world]
    if cheapest.gpus <= world or not same:
        return (cheapest,)
    return cheapest, _cheapest(same)


def _cheapest(changes: Sequence[Change]) -> Change:
    """The fewest GPUs among those that take about the fewest GPU-hours."""
    least = min(change.gpu_hours for change in changes)
    near = [change for change in changes if change.gpu_hours <= NEAR * least]
    return min(near, key=lambda change: (change.gpus, change.gpu_hours))


def _fitting(
    config: Config, steps: Sequence[_Step], hardware: Hardware, before: float
) -> Iterator[Change]:
    """The change that all ``steps`` together are, if it can run and fits."""
    changed = config
    for step in steps:
        changed = step.apply(changed)
    try:
        memory = memory_of(changed)
        after = most_tokens(changed, hardware)
    except ConfigError:  # the change does not go with the rest
        return
    if fits(memory, hardware):
        yield Change(
            tuple(step.override for step in steps),
            "; ".join(step.costs for step in steps),
            max(rank.total for rank in memory),
            changed.parallel.pp * changed.parallel.dp,
            before / after,
        )


def memory_of(config: Config) -> Sequence[RankMemory]:
    """[pp] memory without the padding of buckets, as no layout is made.

    Raises:
        ConfigError: as ``plan_run``.
    """
    _check_experts(config)
    run = run_schedule(steady(config))
    stages = [run.stages(rank) for rank in range(config.parallel.pp)]
    static = static_without_padding(config, run.layers, stages)
    return rank_memory(config, run, static, Hardware.of(config.cluster))


def _check_experts(config: Config) -> None:
    experts, ep, dp = config.model.n_routed_experts, config.parallel.ep, config.parallel.dp
    if experts % ep or dp % ep:
        rule = f"it divides {experts} experts and parallel.dp={dp}"
        raise ConfigError("parallel.ep", ep, rule, "parallel.ep=1")


def _steps(config: Config) -> Iterator[_Step]:
    """Single changes."""
    parallel, size = config.parallel, micro_batch_size(config)
    if size > 1:
        yield _Step(
            "schedule.micro_batch_size=1",
            "smaller products",
            lambda c: replace(c, schedule=replace(c.schedule, micro_batch_size=1)),
        )
    if parallel.layer_split == "even" and parallel.pp * parallel.vpp > 1:
        yield _parallel("nothing, if not even faster", layer_split="balanced")
    if parallel.schedule in ("gpipe", "k2", "interleaved_1f1b") and parallel.vpp == 1:
        yield _parallel("all-to-all no longer hidden", schedule="1f1b")
    if parallel.weight_grads_held is None:
        for held in FEWER_HELD.get(parallel.schedule, ()):
            yield _parallel("weight gradients that fill no wait", weight_grads_held=held)
    if config.activation.policy == "none":
        yield _Step(
            "activation=k2",
            "recomputation and copies to the host",
            lambda c: replace(c, activation=replace(c.activation, policy="k2")),
        )
    if config.model.n_routed_experts % (2 * parallel.ep) == 0 and parallel.dp % (2 * parallel.ep):
        yield _parallel(
            "twice the GPUs, and an all-to-all over twice the ranks",
            ep=2 * parallel.ep,
            dp=2 * parallel.dp,
        )
    elif config.model.n_routed_experts % (2 * parallel.ep) == 0:
        yield _parallel("an all-to-all over twice the ranks", ep=2 * parallel.ep)
    order = "k2" if parallel.schedule == "none" else parallel.schedule
    if parallel.dp % 2 == 0:
        more = {"pp": 2 * parallel.pp, "dp": parallel.dp // 2, "schedule": order}
        yield _parallel("a longer pipeline", **more)
    for factor in (2, 4, 8):
        yield _parallel(f"{factor} times the GPUs", dp=factor * parallel.dp)
    yield _parallel("a longer pipeline and twice the GPUs", pp=2 * parallel.pp, schedule=order)


def _parallel(costs: str, **values: object) -> _Step:
    return _Step(
        " ".join(f"parallel.{key}={value}" for key, value in values.items()),
        costs,
        lambda c: replace(c, parallel=replace(c.parallel, **values)),  # type: ignore[arg-type]
    )
