"""Who orthogonalises which matrix, so that Newton-Schulz takes no rank much longer than another.

A matrix that lies whole in a shard is its holder's. A matrix that is cut over shards goes to
whoever has least to do, the costliest first (longest processing time first). In K2 that alone
is not even: one o_proj costs half as much as the 36 expert matrices of a rank at 2,048. So a
rank with too much then lends whole expert matrices to the ranks of its stage with least, who
need not be replicas of its experts: they hold nothing of them and send their update back.

Pure, and decided by integers only: every rank finds the same owners.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

from kimi_pretrain.optim.buckets import Bucket, Layout

Cost = Callable[[int, int], int]

# A rank with more than this times the mean lends. Less would move more bytes, and one expert
# matrix is 3 % of a rank's work in K2 at 2,048 ranks.
LEND_ABOVE = 1.05


def newton_schulz_flops(rows: int, cols: int) -> int:
    """FLOPs of one Newton-Schulz step: 4 m^2 n + 2 m^3, m the shorter side, n the longer.

    X X^T and the product with X cost 2 m^2 n each, the square of the Gram matrix 2 m^3. The
    design's max x min^2 orders matrices almost the same way; this is what they take.
    """
    m, n = sorted((rows, cols))
    return 4 * m * m * n + 2 * m**3


def assign_owners(buckets: Sequence[Bucket], edp: int, ep: int) -> tuple[Bucket, ...]:
    """The buckets of a stage with their ``owners`` filled in."""
    return _Assignment(buckets, edp, ep).buckets()


def work(layout: Layout, steps: int = 5, cost: Cost = newton_schulz_flops) -> list[int]:
    """What Newton-Schulz costs each dp rank: FLOPs of ``steps`` steps on what it owns."""
    total = [0] * layout.dp
    for bucket in layout.buckets:
        for row in bucket.owners:
            for matrix, owner in zip(bucket.matrices, row, strict=True):
                total[owner] += steps * cost(matrix.rows, matrix.cols)
    return total


def imbalance(layout: Layout, cost: Cost = newton_schulz_flops) -> float:
    """The busiest rank's Newton-Schulz work over the mean of the dp ranks; 1.0 for none."""
    loads = work(layout, cost=cost)
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def lent(layout: Layout) -> int:
    """Expert matrices of the stage that another rank than their holder orthogonalises."""
    return sum(
        owner != bucket.dp_rank(matrix.offset // bucket.shard, ep_index, layout.ep)
        for bucket in layout.buckets
        if bucket.group == "edp"
        for ep_index, owners in enumerate(bucket.owners)
        for matrix, owner in zip(bucket.matrices, owners, strict=True)
    )


class _Assignment:
    """Owners while they are being chosen."""

    def __init__(self, buckets: Sequence[Bucket], edp: int, ep: int) -> None:
        self.ep = ep
        self.given = buckets
        self.load = [0] * (edp * ep)
        self.rows = [self._holders(bucket) for bucket in buckets]
        # A heap of (load, rank): each rank's present load, and older ones that are passed over.
        self.idle = [(load, rank) for rank, load in enumerate(self.load)]
        heapify(self.idle)
        self._spread_flat()
        self._lend(LEND_ABOVE * sum(self.load) / len(self.load))

    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(
            replace(bucket, owners=tuple(tuple(row) for row in rows))
            for bucket, rows in zip(self.given, self.rows, strict=True)
        )

    def _holders(self, bucket: Bucket) -> list[list[int]]:
        """Rows of owners: in aligned buckets whoever holds a matrix, in flat ones -1 for now."""
        if bucket.kind == "adamw":
            return []
        if bucket.kind == "flat":
            return [[-1] * len(bucket.matrices)]
        rows = [
            [bucket.dp_rank(m.offset // bucket.shard, ep_index, self.ep) for m in bucket.matrices]
            for ep_index in range(self.ep if bucket.group == "edp" else 1)
        ]
        for row in rows:
            for matrix, rank in zip(bucket.matrices, row, strict=True):
                self.load[rank] += newton_schulz_flops(matrix.rows, matrix.cols)
        return rows

    def _spread_flat(self) -> None:
        """Cut matrices, the costliest first, each to the rank with least to do."""
        queue = [
            (newton_schulz_flops(matrix.rows, matrix.cols), number, index)
            for number, bucket in enumerate(self.given)
            if bucket.kind == "flat"
            for index, matrix in enumerate(bucket.matrices)
        ]
        for cost, number, index in sorted(queue, key=lambda item: -item[0]):
            rank = self._least()
            self.rows[number][0][index] = rank
            self._add(rank, cost)

    def _lend(self, limit: float) -> None:
        """Lend expert matrices until nobody is above ``limit`` or can.

        The least load never falls meanwhile, so who cannot lend now never can.
        """
        own = self._lendable()
        busiest = [(-load, rank) for rank, load in enumerate(self.load)]
        heapify(busiest)
        while busiest and -busiest[0][0] > limit:
            load, busy = heappop(busiest)
            least = self._least()
            gap = -load - self.load[least]
            # the pair's maximum after lending a matrix of this cost
            choices = {max(gap - cost, cost): cost for cost in own[busy] if cost < gap}
            if -load != self.load[busy] or not choices:
                continue  # an older load, or one that stays
            cost = choices[min(choices)]
            number, ep_index, index = own[busy][cost].pop()
            if not own[busy][cost]:
                del own[busy][cost]
            self.rows[number][ep_index][index] = least
            for rank, more in ((busy, -cost), (least, cost)):
                self._add(rank, more)
                heappush(busiest, (-self.load[rank], rank))

    def _add(self, rank: int, cost: int) -> None:
        self.load[rank] += cost
        heappush(self.idle, (self.load[rank], rank))

    def _least(self) -> int:
        """The rank with least to do, of several the first."""
        while self.idle[0][0] != self.load[self.idle[0][1]]:
            heappop(self.idle)
        return self.idle[0][1]

    def _lendable(self) -> list[dict[int, list[tuple[int, int, int]]]]:
        """For each rank: cost -> its expert matrices (bucket, ep index, index).

        The last of a list is lent first: it is of the bucket that backward finishes first.
        """
        own: list[dict[int, list[tuple[int, int, int]]]] = [{} for _ in self.load]
        for number in reversed(range(len(self.given))):
            bucket = self.given[number]
            if bucket.group != "edp" or bucket.kind != "aligned":
                continue
            for ep_index, row in enumerate(self.rows[number]):
                for index, (matrix, holder) in enumerate(zip(bucket.matrices, row, strict=True)):
                    cost = newton_schulz_flops(matrix.rows, matrix.cols)
                    own[holder].setdefault(cost, []).append((number, ep_index, index))
        return own
