"""Who orthogonalises which matrix, so that Newton-Schulz takes no rank much longer than another.

A matrix that lies whole in a shard is its holder's. A matrix that is cut over shards goes to
whoever has least to do, the costliest first (longest processing time first). In K2 that alone
is not even: one o_proj costs half as much as the 36 expert matrices of a rank at 2,048. So a
rank with too much then lends whole expert matrices to the replicas of its shard, who hold
nothing of them and send their update back.

Pure, and decided by integers only: every rank finds the same owners.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

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
        for ep_index, row in enumerate(bucket.owners):
            for matrix, owner in zip(bucket.matrices, row, strict=True):
                rank = _dp_rank(bucket, owner, ep_index, layout.ep)
                total[rank] += steps * cost(matrix.rows, matrix.cols)
    return total


def imbalance(layout: Layout, cost: Cost = newton_schulz_flops) -> float:
    """The busiest rank's Newton-Schulz work over the mean of the dp ranks; 1.0 for none."""
    loads = work(layout, cost=cost)
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def _dp_rank(bucket: Bucket, owner: int, ep_index: int, ep: int) -> int:
    return owner * ep + ep_index if bucket.group == "edp" else owner


class _Assignment:
    """Owners while they are being chosen."""

    def __init__(self, buckets: Sequence[Bucket], edp: int, ep: int) -> None:
        self.edp, self.ep = edp, ep
        self.given = buckets
        self.load = [0] * (edp * ep)
        self.rows: list[list[list[int]]] = []
        for bucket in buckets:
            self.rows.append(self._holders(bucket))
        self._spread_flat()
        limit = LEND_ABOVE * sum(self.load) / len(self.load)
        for ep_index in range(ep):
            self._lend(ep_index, limit)

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
        holders = [matrix.offset // bucket.shard for matrix in bucket.matrices]
        rows = self.ep if bucket.group == "edp" else 1
        for ep_index in range(rows):
            for matrix, holder in zip(bucket.matrices, holders, strict=True):
                rank = _dp_rank(bucket, holder, ep_index, self.ep)
                self.load[rank] += newton_schulz_flops(matrix.rows, matrix.cols)
        return [list(holders) for _ in range(rows)]

    def _spread_flat(self) -> None:
        """Cut matrices, the costliest first, each to the rank with least to do.

        Of equals the one whose edp group has least: costly ones then land in different
        groups, and each group has replicas enough to lend to.
        """
        column = [sum(self.load[ep_index :: self.ep]) for ep_index in range(self.ep)]
        queue = [
            (newton_schulz_flops(matrix.rows, matrix.cols), number, index)
            for number, bucket in enumerate(self.given)
            if bucket.kind == "flat"
            for index, matrix in enumerate(bucket.matrices)
        ]
        for cost, number, index in sorted(queue, key=lambda item: -item[0]):
            rank = min(range(len(self.load)), key=lambda r: (self.load[r], column[r % self.ep], r))
            self.rows[number][0][index] = rank
            self.load[rank] += cost
            column[rank % self.ep] += cost

    def _lend(self, ep_index: int, limit: float) -> None:
        """Lend expert matrices within one edp group until nobody is above ``limit`` or can.

        The least load of the group never falls meanwhile, so who cannot lend now never can.
        """
        own = self._lendable(ep_index)
        ranks = range(ep_index, len(self.load), self.ep)
        candidates = set(ranks)
        while candidates:
            busy = max(candidates, key=lambda r: (self.load[r], -r))
            if self.load[busy] <= limit:
                return
            least = min(ranks, key=lambda r: (self.load[r], r))
            gap = self.load[busy] - self.load[least]
            # the pair's maximum after lending a matrix of this cost
            choices = {max(gap - cost, cost): cost for cost in own[busy // self.ep] if cost < gap}
            if not choices:
                candidates.remove(busy)
                continue
            cost = choices[min(choices)]
            stack = own[busy // self.ep][cost]
            number, index = stack.pop()
            if not stack:
                del own[busy // self.ep][cost]
            self.rows[number][ep_index][index] = least // self.ep
            self.load[busy] -= cost
            self.load[least] += cost

    def _lendable(self, ep_index: int) -> list[dict[int, list[tuple[int, int]]]]:
        """For each edp rank of a group: cost -> its expert matrices (bucket, index).

        The last of a list is lent first: it is of the bucket that backward finishes first.
        """
        own: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(self.edp)]
        for number in reversed(range(len(self.given))):
            bucket = self.given[number]
            if bucket.group != "edp" or bucket.kind != "aligned":
                continue
            for index, holder in enumerate(self.rows[number][ep_index]):
                matrix = bucket.matrices[index]
                cost = newton_schulz_flops(matrix.rows, matrix.cols)
                own[holder].setdefault(cost, []).append((number, index))
        return own
