"""Generators: pure functions from a pipeline's shape to its schedule.

All but one of them are one idea, `_interleaved`: every rank walks the forwards in one order and
the backwards in the mirrored order, a number of forwards ahead (its warm-up). They differ in that
number and in the passes that follow. Only compute actions are made here; `insert_p2p` and
`insert_offload` add the rest.
"""

from collections.abc import Callable, Iterator, Sequence

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.pipeline.actions import BACKWARD, Action, Kind, Node, Schedule
from kimi_pretrain.pipeline.dualpipe import dualpipe_v
from kimi_pretrain.pipeline.passes import overlap_expert_comm, split_weight_grad
from kimi_pretrain.pipeline.replay import Replay, compute_needs
from kimi_pretrain.pipeline.shape import check_shape, looped_placement

__all__ = [
    "GENERATORS",
    "dualpipe_v",
    "forward_only",
    "generate",
    "gpipe",
    "interleaved_1f1b",
    "k2",
    "one_f_one_b",
    "zb_h1",
]


def gpipe(pp: int, vpp: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965). Keeps every microbatch."""
    everything = vpp * microbatches
    return _interleaved("gpipe", pp, vpp, microbatches, None, lambda rank: everything)


def one_f_one_b(pp: int, vpp: int, microbatches: int) -> Schedule:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): rank r keeps at most ``pp - r`` microbatches.

    Raises:
        ConfigError: ``vpp`` is not 1: that is `interleaved_1f1b`.
    """
    if vpp != 1:
        rule = "1f1b has one stage a rank"
        raise ConfigError("parallel.vpp", vpp, rule, "parallel.schedule=interleaved_1f1b")
    return _interleaved("1f1b", pp, 1, microbatches, None, lambda rank: pp - rank - 1)


def interleaved_1f1b(
    pp: int, vpp: int, microbatches: int, group_size: int | None = None
) -> Schedule:
    """Interleaved 1F1B (arXiv 2104.04473) in Megatron's order, the schedule K2 starts from.

    Microbatches go in groups: each of a rank's stages takes the whole group before the next
    stage does. Rank r runs ``2 (pp - r - 1) + (vpp - 1) group_size`` forwards ahead, with one
    stage a rank ``pp - r - 1`` as 1F1B. Any number of microbatches works; an incomplete last
    group costs idle time.

    Args:
        pp: ranks.
        vpp: stages a rank.
        microbatches: of one step.
        group_size: microbatches of a group, at least ``pp``; None: ``pp``.

    Raises:
        ConfigError: an argument below 1, or a group smaller than ``pp``, which would have each
            group wait for the pipeline's whole length.
    """
    hop = 1 if vpp == 1 else 2
    warm_up = _warm_up(pp, vpp, group_size, hop)
    return _interleaved("interleaved_1f1b", pp, vpp, microbatches, group_size, warm_up)


def k2(pp: int, vpp: int, microbatches: int, group_size: int | None = None) -> Schedule:
    """Kimi K2's schedule (arXiv 2507.20534, 2.4.2): interleaved 1F1B with expert parallel hidden.

    "By increasing the number of warm-up micro-batches, we can overlap EP all-to-all communication
    with computation under the standard interleaved 1F1B schedule." One more warm-up forward a
    rank leaves, in the steady state, a forward of one microbatch beside a backward of another:
    they are one `Overlap`. The backward is of the input only; the weight gradient follows the
    pair, so that the gradient is on its way to the previous stage meanwhile.

    A pair is one step on each of two neighbours, so that with one stage a rank, too, every hop to
    the end costs two forwards ahead: ``2 (pp - r - 1) + (vpp - 1) group_size + 1``. With
    1F1B's ``pp - r`` the two would take turns, at half the speed.

    Args and errors are those of `interleaved_1f1b`.
    """
    interleaved = _warm_up(pp, vpp, group_size, 2)

    def warm_up(rank: int) -> int:
        return interleaved(rank) + 1

    order = _interleaved("k2", pp, vpp, microbatches, group_size, warm_up)
    return split_weight_grad(overlap_expert_comm(order, apart=[warm_up(r) for r in range(pp)]))


def zb_h1(pp: int, vpp: int, microbatches: int) -> Schedule:
    """ZB-H1 (arXiv 2401.10241): weight gradients fill the bubble at the end, for comparison.

    Rank r runs ``pp - r - 1 + (vpp - 1) pp`` forwards ahead and its weight gradients r
    backwards behind, so that every rank keeps as much as the first rank of 1F1B.
    """
    plain = _interleaved("zb_h1", pp, vpp, microbatches, None, _warm_up(pp, vpp, None, 1))
    return split_weight_grad(plain, delay=range(pp))


def forward_only(
    pp: int,
    vpp: int,
    microbatches: int,
    group_size: int | None = None,
    placement: Sequence[int] | None = None,
) -> Schedule:
    """The forwards of `interleaved_1f1b` alone: held-out evaluation. Nothing is kept.

    With any ``placement`` ([pp * vpp] the rank of each stage; None: round and round): a group
    goes through a rank's stages in ascending order, so no rank can block another.
    """
    check_shape(pp, vpp, microbatches, group_size)
    holders = looped_placement(pp, vpp) if placement is None else tuple(placement)
    held = [[stage for stage, holder in enumerate(holders) if holder == r] for r in range(pp)]
    order = list(_order(vpp, microbatches, group_size or pp))
    ranks = tuple(
        tuple(Action(Kind.F, stages[chunk], microbatch) for chunk, microbatch in order)
        for stages in held
    )
    return Schedule("forward_only", pp, vpp, microbatches, ranks, holders)


Generator = Callable[[int, int, int], Schedule]

GENERATORS: dict[str, Generator] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "k2": k2,
    "zb_h1": zb_h1,
    "dualpipe_v": dualpipe_v,
}


def generate(name: str, pp: int, vpp: int, microbatches: int) -> Schedule:
    """The schedule that ``parallel.schedule`` names.

    Raises:
        ConfigError: no generator has that name, or it refuses the shape.
    """
    if name not in GENERATORS:
        fix = f"parallel.schedule={nearest_name(name, GENERATORS)}"
        raise ConfigError("parallel.schedule", name, f"one of {', '.join(GENERATORS)}", fix)
    return GENERATORS[name](pp, vpp, microbatches)


def _warm_up(pp: int, vpp: int, group_size: int | None, hop: int) -> Callable[[int], int]:
    """Forwards of a rank before its first backward can follow one forward more."""
    group = pp if group_size is None else group_size
    return lambda rank: hop * (pp - rank - 1) + (vpp - 1) * group


def _order(vpp: int, microbatches: int, group: int) -> Iterator[tuple[int, int]]:
    """(chunk, microbatch) of a rank's forwards: a group through all chunks, then the next."""
    for start in range(0, microbatches, group):
        for chunk in range(vpp):
            for microbatch in range(start, min(start + group, microbatches)):
                yield chunk, microbatch


def _interleaved(
    name: str,
    pp: int,
    vpp: int,
    microbatches: int,
    group_size: int | None,
    warm_up: Callable[[int], int],
) -> Schedule:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards left."""
    check_shape(pp, vpp, microbatches, group_size)
    order = list(_order(vpp, microbatches, group_size or pp))
    ranks, in_flight = [], []
    for rank in range(pp):
        forwards = [Action(Kind.F, c * pp + rank, m) for c, m in order]
        backwards = [Action(Kind.B, (vpp - 1 - c) * pp + rank, m) for c, m in order]
        ahead = min(warm_up(rank), len(order))
        row: list[Node] = list(forwards[:ahead])
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            row += [forward, backward]
        row += backwards[len(order) - ahead :]
        ranks.append(row)
        in_flight.append(min(ahead + 1, len(order)))
    _turn_blocked(ranks, pp * vpp)
    return Schedule(
        name,
        pp,
        vpp,
        microbatches,
        tuple(tuple(row) for row in ranks),
        looped_placement(pp, vpp),
        tuple(in_flight),
    )


def _turn_blocked(ranks: list[list[Node]], stages: int) -> None:
    """Where the ranks would block each other, a backward that can run goes before the forward.

    That happens only where a group has fewer microbatches than there are ranks: a forward then
    waits for the same microbatch to come round the pipeline, and the backwards behind it hold up
    what it waits for. Turning never raises what a rank keeps.
    """
    replay = Replay(ranks, compute_needs(stages))
    while not replay.run():
        for row, head in zip(ranks, replay.heads, strict=True):
            later = (i for i in range(head, len(row)) if _is_backward(row[i]))
            turn = next(later, None)
            if turn is not None and _ready(replay, row[turn]):
                row.insert(head, row.pop(turn))


def _is_backward(node: Node) -> bool:
    return isinstance(node, Action) and node.kind in BACKWARD


def _ready(replay: Replay, node: Node) -> bool:
    return isinstance(node, Action) and replay.missing(node) is None
