"""What travels between a bucket's shards and the owners of its matrices, as a pure plan.

A matrix that is cut over shards, or lent, goes to its owner in an all-to-all, is orthogonalised
there and comes back in another with sending and receiving swapped. Both sides list segments in
the bucket's order, so no index travels with them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from kimi_pretrain.optim.buckets import Bucket


class Segment(NamedTuple):
    """Elements [start, stop), from the bucket's start, of matrix number ``matrix``.

    A bucket of experts exists once for each ep index, with other experts: ``ep_index`` says which
    one is meant. It is 0 where there is one bucket for all.
    """

    ep_index: int
    matrix: int
    start: int
    stop: int


@dataclass(frozen=True)
class Exchange:
    """One rank's part in bringing the pieces of a bucket to their owners, over dp.

    What rank r sends to o is what o receives from r. The segments that a rank receives of one
    matrix, its own among them, tile it in order of the ranks they come from.
    """

    local: tuple[int, ...]  # matrices that lie whole in this rank's shard and are its own
    send: tuple[tuple[Segment, ...], ...]  # [dp] to each owner, of this rank's shard
    receive: tuple[tuple[Segment, ...], ...]  # [dp] from each rank, of matrices owned here
    moves: bool  # whether any rank sends to another: the same on every rank


def plan_exchange(bucket: Bucket, rank: int, ep: int) -> Exchange:
    """The exchange of a bucket as one rank sees it.

    Args:
        bucket: with its owners; what AdamW updates never travels.
        rank: in dp.
        ep: ranks of an expert-parallel group.
    """
    dp = bucket.ranks * (ep if bucket.group == "edp" else 1)
    local: list[int] = []
    send: list[list[Segment]] = [[] for _ in range(dp)]
    receive: list[list[Segment]] = [[] for _ in range(dp)]
    moves = False
    for ep_index, owners in enumerate(bucket.owners):
        for number, (matrix, owner) in enumerate(zip(bucket.matrices, owners, strict=True)):
            parts = bucket.parts(matrix.offset, matrix.stop)
            holders = [bucket.dp_rank(part.rank, ep_index, ep) for part in parts]
            if holders == [owner]:
                if rank == owner:
                    local.append(number)
                continue
            moves = True
            for holder, part in zip(holders, parts, strict=True):
                segment = Segment(ep_index, number, part.start, part.stop)
                if holder == rank:
                    send[owner].append(segment)
                if owner == rank:
                    receive[holder].append(segment)
    return Exchange(tuple(local), _frozen(send), _frozen(receive), moves)


def _frozen(lists: list[list[Segment]]) -> tuple[tuple[Segment, ...], ...]:
    return tuple(tuple(segments) for segments in lists)
