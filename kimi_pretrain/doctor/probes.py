"""Short loads that every rank runs at the same time: matmul, copies, exchanges, an all-to-all.

All at once, as in a run: GPUs of a node share power and cooling, ranks of a switch its uplinks.
A rank's figure is the quickest of several passes, and where that makes it slow the probe is run
again: who is named was slow every time. Within a pass it is the quickest round on a CPU, whose
cores other processes take at times, and the median on an accelerator, where a clock that sinks
under load is what is looked for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from statistics import median

import torch

from kimi_pretrain.doctor.outliers import outliers
from kimi_pretrain.doctor.pairs import Round, between_hosts, within_hosts
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.world import World

PASSES = 3
AGAIN = 5  # times that a probe is repeated while somebody is slow in it
MiB = 1 << 20


@dataclass(frozen=True)
class Load:
    """Sizes of the probes on one kind of device."""

    matmul: int  # rows and columns
    matmul_dtype: torch.dtype
    copy_bytes: int
    exchange_bytes: int  # each way, between two ranks
    all_to_all_bytes: int  # from each rank, to all together
    rounds: int  # in a pass


CPU = Load(384, torch.float32, 16 * MiB, 1 * MiB, 1 * MiB, 20)
GPU = Load(8192, torch.bfloat16, 1024 * MiB, 64 * MiB, 256 * MiB, 30)


@dataclass(frozen=True)
class Probe:
    """What one probe measured: seconds of one round by rank, and what a round moves or computes."""

    name: str
    seconds: tuple[float | None, ...]  # [ranks]; None: no part in it
    amount: float  # of `unit` in a round
    unit: str  # FLOP or B


def probe(world: World, hosts: Sequence[str]) -> list[Probe]:
    """Run every probe that makes sense here. Collective.

    Args:
        world: all ranks.
        hosts: [ranks].

    Raises:
        PeerError: a rank failed or did not answer.
    """
    load = CPU if world.device.type == "cpu" else GPU
    moved = 2.0 * load.exchange_bytes
    found = [
        Probe(name, _confirmed(world, hosts, partial(_measured, world, work, load)), amount, unit)
        for name, work, amount, unit in _alone(world.device, load)
    ]
    for name, rounds in (
        ("exchange within a host", within_hosts(hosts)),
        ("exchange between hosts", between_hosts(hosts)),
    ):
        if rounds:
            exchange = partial(_exchanged, world, rounds, load)
            found.append(Probe(name, _confirmed(world, hosts, exchange), moved, "B"))
    group = world.ep if world.ep.size > 1 else world.everyone
    if group.size > 1:
        work, sent = _all_to_all(group, load, world.device)

        def together() -> float:  # all its members are in one all-to-all, and none done before
            return max(_gathered(group, _measured(world, work, load)))

        seconds = _confirmed(world, hosts, together)
        found.append(Probe(f"all-to-all of {group.size} ranks", seconds, sent, "B"))
    return found


def _confirmed(
    world: World, hosts: Sequence[str], measure: Callable[[], float | None]
) -> tuple[float | None, ...]:
    """[ranks] seconds, measured again while they make somebody slow; the least of each rank."""
    seconds = _all(world.everyone, measure())
    for _ in range(AGAIN):
        if not outliers("", seconds, hosts):
            break
        again = _all(world.everyone, measure())
        seconds = tuple(
            None if one is None or other is None else min(one, other)
            for one, other in zip(seconds, again, strict=True)
        )
    return seconds


def _alone(device: torch.device, load: Load) -> list[tuple[str, Callable[[], object], float, str]]:
    """What a rank does without others: (name, one round, how much that is, of what)."""
    size = load.matmul
    a = torch.rand(size, size, device=device).to(load.matmul_dtype)
    product = torch.empty_like(a)
    source = torch.zeros(load.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul = f"matmul {size} x {size} {str(load.matmul_dtype).removeprefix('torch.')}"
    probes: list[tuple[str, Callable[[], object], float, str]] = [
        (matmul, lambda: torch.mm(a, a, out=product), 2.0 * size**3, "FLOP"),
        ("memory copy", lambda: target.copy_(source), float(load.copy_bytes), "B"),
    ]
    if device.type != "cpu":
        held = torch.zeros(load.copy_bytes, dtype=torch.uint8, pin_memory=True)
        copy = ("copy from the host", lambda: target.copy_(held, non_blocking=True))
        probes.append((*copy, float(load.copy_bytes), "B"))
    return probes


def _all_to_all(
    group: Group, load: Load, device: torch.device
) -> tuple[Callable[[], object], float]:
    """One round, and the bytes that leave a rank in it."""
    part = load.all_to_all_bytes // group.size
    sent = torch.zeros(group.size, part, dtype=torch.uint8, device=device)
    arrived = torch.empty_like(sent)
    return lambda: group.all_to_all(arrived, sent).wait(), float(part * (group.size - 1))


def _measured(world: World, work: Callable[[], object], load: Load) -> float:
    """Seconds of one round on this rank."""
    passes = []
    for _ in range(PASSES):
        work()
        world.everyone.barrier()
        passes.append(_usual([_timed(work, world.device) for _ in range(load.rounds)], world))
    return min(passes)


def _exchanged(world: World, rounds: Sequence[Round], load: Load) -> float | None:
    """Seconds that an exchange takes this rank with the quickest of its partners.

    Of two the lower rank sends first: what two ranks exchange over NCCL happens in the order in
    which it is asked for. It has taken as long as the one says who was longer at it.
    """
    group = world.everyone
    leaving = torch.zeros(load.exchange_bytes, dtype=torch.uint8, device=world.device)
    coming = torch.empty_like(leaving)
    figures = []
    for partners in rounds:
        partner = partners[group.index]

        def exchange(partner: int | None = partner) -> None:
            if partner is None:
                return
            if group.index < partner:
                group.send(leaving, partner).wait()
                group.receive(coming, partner).wait()
            else:
                group.receive(coming, partner).wait()
                group.send(leaving, partner).wait()

        seconds = _gathered(group, _measured(world, exchange, load))
        if partner is not None:
            figures.append(max(seconds[group.index], seconds[partner]))
    return min(figures, default=None)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def _usual(seconds: list[float], world: World) -> float:
    return min(seconds) if world.device.type == "cpu" else median(seconds)


def _all(group: Group, value: float | None) -> tuple[float | None, ...]:
    """Every rank's value, by rank."""
    return tuple(None if isnan(number) else number for number in _gathered(group, value))


def _gathered(group: Group, value: float | None) -> list[float]:
    """Every rank's value, by rank; nan for None."""
    mine = torch.tensor([torch.nan if value is None else value], dtype=torch.float64)
    mine = mine.to(group.device)
    values = mine.new_empty(group.size)
    group.all_gather(values, mine).wait()
    return list(values.tolist())
