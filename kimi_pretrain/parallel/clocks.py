"""How far the clocks of ranks are apart."""

from collections.abc import Callable
from time import perf_counter, time

import torch

from kimi_pretrain.parallel.collectives import Group

_ROUNDS = 16
_BARRIERS = 9


def clock_offset(group: Group, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds that added to this rank's ``clock`` give that of the group's first rank.

    The first rank asks each other one for its time, again and again: what was answered in the
    quickest round was read in the middle of it, to within half its time (Cristian, 1989). On
    one machine that is some 10 us.

    Raises:
        PeerError: a rank did not answer before the deadline.
    """
    if group.index > 0:
        return _answer(group, clock)
    for member in range(1, group.size):
        offset = _ask(group, member, clock)
        group.send(_number(group, offset), member).wait()
    return 0.0


def _ask(group: Group, member: int, clock: Callable[[], float]) -> float:
    question, answer = _number(group, 0.0), _number(group, 0.0)
    rounds = []
    for _ in range(_ROUNDS):
        asked = clock()
        group.send(question, member).wait()
        group.receive(answer, member).wait()
        theirs, answered = float(answer), clock()
        rounds.append((answered - asked, (asked + answered) / 2 - theirs))
    return min(rounds)[1]


def _answer(group: Group, clock: Callable[[], float]) -> float:
    question = _number(group, 0.0)
    for _ in range(_ROUNDS):
        group.receive(question, 0).wait()
        float(question)  # has arrived, on a GPU too
        group.send(_number(group, clock()), 0).wait()
    group.receive(question, 0).wait()
    return float(question)


def _number(group: Group, value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64, device=group.device)


def wall_clocks(group: Group, clock: Callable[[], float] = time) -> list[float]:
    """Seconds by which each rank's ``clock`` is ahead of the median of all, the same on every rank.

    Everyone reads its clock when it leaves a barrier: to within what ranks leave it apart,
    milliseconds, but of thousands of ranks at once. ``clock_offset`` is a thousand times as
    sharp and asks one after the other.

    Raises:
        PeerError: a rank did not come.
    """
    rounds = []
    for _ in range(_BARRIERS):
        group.barrier()
        mine = _number(group, clock())
        everyone = mine.new_empty(group.size)
        group.all_gather(everyone, mine).wait()
        rounds.append(everyone - everyone.median())
    return [float(ahead) for ahead in torch.stack(rounds).median(dim=0).values]
