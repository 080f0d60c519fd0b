"""What travels between a bucket's shards and the owners of its matrices, as a pure plan.

A matrix that is cut over shards, or lent, goes to its owner in an all-to-all, is orthogonalised
there and comes back in another with sending and receiving swapped. Both sides list segments in
the bucket's order, so no index travels with them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from kimi_pretrain.optim.buckets import Bucket


class Segment(NamedTuple):
    """Elements [start, stop), from the bucket's start, of matrix number ``matrix``."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True)
class Exchange:
    """One rank's part in bringing the pieces of a bucket to their owners.

    What rank r sends to o is what o receives from r. The segments that a rank receives of one
    matrix, its own among them, tile it in order of the ranks they come from.
    """

    local: tuple[int, ...]  # matrices that lie whole in this rank's shard and are its own
    send: tuple[tuple[Segment, ...], ...]  # [ranks] to each owner, of this rank's shard
    receive: tuple[tuple[Segment, ...], ...]  # [ranks] from each rank, of matrices owned here
    moves: bool  # whether any rank of the group sends to another: the same on every rank


def plan_exchange(bucket: Bucket, rank: int, ep_index: int) -> Exchange:
    """The exchange of a bucket as ``rank`` of its group sees it.

    Args:
        bucket: with its owners; what AdamW updates never travels.
        rank: in the bucket's group, edp or dp.
        ep_index: the rank's place in its expert-parallel group: which edp group it is.
    """
    local: list[int] = []
    send: list[list[Segment]] = [[] for _ in range(bucket.ranks)]
    receive: list[list[Segment]] = [[] for _ in range(bucket.ranks)]
    moves = False
    for number, matrix in enumerate(bucket.matrices):
        owner = bucket.owner(number, ep_index)
        parts = bucket.parts(matrix.offset, matrix.stop)
        if [part.rank for part in parts] == [owner]:
            if rank == owner:
                local.append(number)
            continue
        moves = True
        for part in parts:
            segment = Segment(number, part.start, part.stop)
            if part.rank == rank:
                send[owner].append(segment)
            if owner == rank:
                receive[part.rank].append(segment)
    return Exchange(tuple(local), _frozen(send), _frozen(receive), moves)


def _frozen(lists: list[list[Segment]]) -> tuple[tuple[Segment, ...], ...]:
    return tuple(tuple(segments) for segments in lists)
