"""Small schedules written out here, so that what reads schedules is tested by itself."""

from kimi_pretrain.pipeline.actions import Action, Kind, Node, Overlap, Schedule


def gpipe(pp: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    ranks = tuple(
        tuple(Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in range(microbatches))
        for rank in range(pp)
    )
    return Schedule("gpipe", pp, 1, microbatches, ranks, tuple(range(pp)))


def one_f_one_b(pp: int, vpp: int, microbatches: int, *, paired: bool = False) -> Schedule:
    """1F1B, interleaved where vpp > 1; ``paired``: one more warm-up forward, then pairs."""
    ranks = []
    for rank in range(pp):
        total = vpp * microbatches
        warm_up = 2 * (pp - rank - 1) + (vpp - 1) * pp if vpp > 1 else pp - rank - 1
        warm_up = min(total, warm_up + paired)
        forwards = [_nth(Kind.F, k, rank, pp, vpp) for k in range(total)]
        backwards = [_nth(Kind.B, k, rank, pp, vpp) for k in range(total)]
        nodes: list[Node] = [*forwards[:warm_up]]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            nodes += [Overlap(forward, backward)] if paired else [forward, backward]
        ranks.append((*nodes, *backwards[total - warm_up :]))
    placement = tuple(stage % pp for stage in range(pp * vpp))
    name = "k2" if paired else "interleaved"
    return Schedule(name, pp, vpp, microbatches, tuple(ranks), placement)


def _nth(kind: Kind, k: int, rank: int, pp: int, vpp: int) -> Action:
    group, within = divmod(k, pp * vpp)
    chunk, microbatch = divmod(within, pp)
    chunk = chunk if kind is Kind.F else vpp - 1 - chunk
    return Action(kind, chunk * pp + rank, group * pp + microbatch)
