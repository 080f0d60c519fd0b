"""The fastest layouts of a number of GPUs that fit.

Every combination of pipeline, virtual stages, expert parallelism, schedule, split and microbatch
gets a bound on its speed from its own costs: no rank computes less than its microbatches take,
whatever the order. In the order of their bounds, combinations then get a schedule, memory and,
where they fit, a simulation, until those that are ranked beat every bound that is left. One that
is too large puts off fewer weight gradients, if that is enough.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size, settled
from kimi_pretrain.config.validate import validate_training
from kimi_pretrain.plan.activations import Setting, stage_kept
from kimi_pretrain.plan.bound import most_tokens
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.layout_report import require_muonclip
from kimi_pretrain.plan.memory import RankMemory, static_without_padding
from kimi_pretrain.plan.run_plan import Plan, fits, plan_run, precision_of
from kimi_pretrain.plan.run_schedule import FEWER_HELD, microbatches_of, rank_stages
from kimi_pretrain.plan.shortage import memory_of
from kimi_pretrain.plan.stages import split_layers

VPP = (1, 2, 4)
SECONDS = 20.0


@dataclass(frozen=True)
class Candidate:
    """One layout: overrides that a run takes."""

    pp: int
    vpp: int
    ep: int
    dp: int
    schedule: str
    layer_split: str
    micro_batch_size: int
    weight_grads_held: int | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        names = ["pp", "vpp", "ep", "dp", "schedule", "layer_split"]
        if self.weight_grads_held is not None:
            names.append("weight_grads_held")
        parallel = tuple(f"parallel.{name}={getattr(self, name)}" for name in names)
        return (*parallel, f"schedule.micro_batch_size={self.micro_batch_size}")

    @property
    def lighter(self) -> Iterator["Candidate"]:
        """The same with fewer weight gradients put off, where they may be several or one."""
        if self.weight_grads_held is None:
            for held in FEWER_HELD.get(self.schedule, ()):
                yield replace(self, weight_grads_held=held)

    def of(self, config: Config) -> Config:
        """``config`` with this layout."""
        parallel = replace(
            config.parallel,
            pp=self.pp,
            vpp=self.vpp,
            ep=self.ep,
            dp=self.dp,
            schedule=self.schedule,
            schedule_file=None,
            layer_split=self.layer_split,
            weight_grads_held=self.weight_grads_held,
        )
        schedule = replace(config.schedule, micro_batch_size=self.micro_batch_size)
        return settled(replace(config, parallel=parallel, schedule=schedule))


@dataclass(frozen=True)
class Ranked:
    """A layout that fits, simulated."""

    candidate: Candidate
    plan: Plan


@dataclass(frozen=True)
class Rejected:
    """A layout that is not among the ranked, and why."""

    candidate: Candidate
    kind: str  # GPU memory | host memory | shape | slower | not tried
    reason: str
    over: float = 0.0  # bytes
    bound: float = 0.0  # tokens/s/GPU that it cannot exceed


@dataclass(frozen=True)
class Found:
    """What a search found."""

    model: str
    cluster: str
    gpus: int
    ranked: tuple[Ranked, ...]  # the fastest first
    rejected: tuple[Rejected, ...]
    proved: bool  # no layout that was left out can be faster than the ranked ones


def search(config: Config, gpus: int, top: int = 10, seconds: float = SECONDS) -> Found:
    """The ``top`` fastest layouts of ``gpus`` GPUs.

    Args:
        config: of the run; its layout, schedule and microbatch are what is searched.
        gpus: all of them are used.
        top: how many to rank.
        seconds: for all of it; what is left then keeps its bound.

    Raises:
        ConfigError: no GPU, nothing to rank, or what ``plan_run`` refuses whatever the layout.
    """
    if gpus < 1:
        raise ConfigError("--gpus", gpus, "at least 1", "--gpus 8")
    if top < 1:
        raise ConfigError("--top", top, "at least 1", "--top 10")
    if not seconds > 0:
        raise ConfigError("--seconds", seconds, "above zero", f"--seconds {SECONDS:g}")
    clock = _Clock(monotonic() + seconds)
    precision_of(config)
    require_muonclip(config)
    hardware = Hardware.of(config.cluster)
    Setting.of(config, micro_batch_size(config))
    rejected: list[Rejected] = []
    bounds: list[tuple[float, Candidate]] = []
    untried = 0
    for candidate in candidates(config, gpus):
        if not clock.has_time():
            rejected.append(Rejected(candidate, "not tried", "time ran out before"))
            untried += 1
            continue
        outcome = _bound(candidate, config, hardware)
        if isinstance(outcome, Rejected):
            rejected.append(outcome)
        else:
            bounds.append((outcome, candidate))
    bounds.sort(key=lambda item: -item[0])
    ranked: list[Ranked] = []
    proved = not untried
    for place, (bound, candidate) in enumerate(bounds):
        last = ranked[top - 1].plan.tokens_per_gpu_second if len(ranked) >= top else 0.0
        nodes = candidate.pp * candidate.vpp * microbatches_of(candidate.of(config))
        if last >= bound or not clock.has_time(nodes):
            proved = proved and last >= bound
            rejected += [_slower(*item, last) for item in bounds[place:]]
            break
        started = monotonic()
        judged = _judge(candidate, config, hardware)
        clock.took(nodes, monotonic() - started)
        if isinstance(judged, Rejected):
            rejected.append(judged)
        else:
            ranked.append(judged)
            ranked.sort(key=lambda r: -r.plan.tokens_per_gpu_second)
    last = ranked[:top][-1].plan.tokens_per_gpu_second if ranked else 0.0
    rejected += [_slower(r.plan.tokens_per_gpu_second, r.candidate, last) for r in ranked[top:]]
    name = config.model.name
    return Found(name, hardware.name, gpus, tuple(ranked[:top]), tuple(rejected), proved)


@dataclass
class _Clock:
    """When a search ends, and how long a node of a schedule takes it."""

    ends: float
    seconds: float = 0.0  # of the layouts that were judged
    nodes: int = 0

    def has_time(self, nodes: int = 0) -> bool:
        """Whether a schedule of so many nodes would be judged in time."""
        each = self.seconds / self.nodes if self.nodes else 0.0
        return monotonic() + each * nodes <= self.ends

    def took(self, nodes: int, seconds: float) -> None:
        self.nodes += nodes
        self.seconds += seconds


def candidates(config: Config, gpus: int) -> Iterator[Candidate]:
    """Every layout that uses all GPUs and divides experts evenly; of equal splits one."""
    model, held = config.model, config.parallel.weight_grads_held
    for pp in _divisors(gpus):
        if pp > model.num_hidden_layers:
            continue
        dp = gpus // pp
        for ep in _divisors(model.n_routed_experts):
            if dp % ep:
                continue
            for vpp in VPP:
                if pp * vpp > model.num_hidden_layers or (pp == 1 and vpp > 1):
                    continue
                splits = _splits(config, pp, vpp, ep)
                for schedule in _schedules(pp, vpp):
                    for split in splits:
                        for size in (1, 2):
                            yield Candidate(pp, vpp, ep, dp, schedule, split, size, held)


def _splits(config: Config, pp: int, vpp: int, ep: int) -> tuple[str, ...]:
    """Where both are the same layers, the one that takes no thought."""
    even, balanced = (
        split_layers(
            config.model, replace(config.parallel, pp=pp, vpp=vpp, ep=ep, layer_split=split)
        )
        for split in ("even", "balanced")
    )
    return ("even",) if even == balanced else ("balanced", "even")


def _schedules(pp: int, vpp: int) -> tuple[str, ...]:
    if pp == 1:
        return "1f1b", "k2"
    if vpp == 1:
        return "1f1b", "k2", "zb_h1"
    return ("interleaved_1f1b", "k2", *(["dualpipe_v"] if vpp == 2 else []))


def _bound(candidate: Candidate, config: Config, hardware: Hardware) -> float | Rejected:
    """Tokens/s/GPU that a layout cannot exceed; no schedule is made for it."""
    changed = candidate.of(config)
    try:
        validate_training(changed)
        if candidate.schedule == "dualpipe_v" and microbatches_of(changed) < 2 * candidate.pp:
            fix = f"schedule.micro_batch_size={candidate.micro_batch_size // 2 or 1}"
            rule = f"dualpipe_v needs {2 * candidate.pp}"
            raise ConfigError("microbatches", microbatches_of(changed), rule, fix)
    except ConfigError as error:
        return Rejected(candidate, "shape", str(error))
    large = _too_large(candidate, changed, hardware)
    return most_tokens(changed, hardware) if large is None else large


def _judge(candidate: Candidate, config: Config, hardware: Hardware) -> Ranked | Rejected:
    """The plan of a layout, or of the first lighter one that fits; or why it does not."""
    judged = _planned(candidate, config, hardware)
    if isinstance(judged, Rejected) and judged.kind == "GPU memory":
        for lighter in candidate.lighter:
            again = _planned(lighter, config, hardware)
            if isinstance(again, Ranked):
                return again
    return judged


def _planned(candidate: Candidate, config: Config, hardware: Hardware) -> Ranked | Rejected:
    changed = candidate.of(config)
    try:
        memory = memory_of(changed)
        if not fits(memory, hardware):
            return _over(candidate, memory, hardware)
        plan = plan_run(changed, memory)
    except ConfigError as error:
        return Rejected(candidate, "shape", str(error))
    return Ranked(candidate, plan) if plan.fits else _over(candidate, plan.memory, hardware)


def _slower(bound: float, candidate: Candidate, last: float) -> Rejected:
    reason = f"at most {bound:,.0f} tokens/s/GPU, and the last that is ranked has {last:,.0f}"
    return Rejected(candidate, "slower", reason, bound=bound)


def _too_large(candidate: Candidate, config: Config, hardware: Hardware) -> Rejected | None:
    """Where one of the first ranks holds too much whatever the schedule.

    Rank r keeps at least ``pp - r`` microbatches of its first stage: so many it starts before its
    first gradient can be there.
    """
    layers = split_layers(config.model, config.parallel)
    setting = Setting.of(config, candidate.micro_batch_size)
    ranks = range(min(2, candidate.pp))
    placed = rank_stages(config)
    static = static_without_padding(config, layers, [placed[rank] for rank in ranks])
    for rank, held in zip(ranks, static, strict=True):
        fixed = held.parameters + held.gradients + held.optimizer + hardware.reserved_bytes
        count = min(candidate.pp - rank, microbatches_of(config))
        kept = count * stage_kept(setting, layers[placed[rank][0]]).device
        over = fixed + kept - hardware.memory_bytes
        if over > 0:
            reason = (
                f"rank {rank} needs at least {(fixed + kept) / 1e9:.0f} GB, {over / 1e9:.1f} more "
                f"than there are; activations are {kept / 1e9:.1f}"
            )
            return Rejected(candidate, "GPU memory", reason, over)
    return None


def _over(candidate: Candidate, memory: Sequence[RankMemory], hardware: Hardware) -> Rejected:
    full = max(memory, key=lambda rank: rank.total)
    over = full.total - hardware.memory_bytes
    if over > 0:
        reason = (
            f"rank {full.rank} needs {full.total / 1e9:.1f} GB, {over / 1e9:.1f} more than there "
            f"are; activations are {full.activations / 1e9:.1f}"
        )
        return Rejected(candidate, "GPU memory", reason, over)
    full = max(memory, key=lambda rank: rank.host)
    over = full.host - hardware.host_memory_bytes
    reason = (
        f"rank {full.rank} keeps {full.host / 1e9:.0f} GB on its host, {over / 1e9:.0f} too many"
    )
    return Rejected(candidate, "host memory", reason, over)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
