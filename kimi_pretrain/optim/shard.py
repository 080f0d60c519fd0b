"""One rank's shard of one bucket: master, moments, and the matrices' way to their owners.

A Muon matrix that lies whole on the rank that orthogonalises it is updated in place. Of the
others every holder sends its part of the update, in the dtype of Newton-Schulz, to the
owner, which returns the orthogonalised part: 2 x 2 bytes an element, against the 4 + 2 of
the gradients' and the parameters' way.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kimi_pretrain.optim.buckets import Matrix
from kimi_pretrain.optim.buffers import BucketBuffers
from kimi_pretrain.optim.exchange import Exchange, Segment, plan_exchange
from kimi_pretrain.optim.muon_update import Stack, muon_
from kimi_pretrain.optim.orthogonalize import newton_schulz
from kimi_pretrain.optim.piece import NamedRange
from kimi_pretrain.optim.settings import Settings
from kimi_pretrain.parallel.collectives import Group, Handle

_Key = tuple[int, int]  # ep index and number of a matrix
NORM_ELEMENTS = 2**22  # a norm in float64 copies what it reads, on a CPU: not all at once


class Shard:
    """State and update of one bucket's part on this rank."""

    def __init__(self, buffers: BucketBuffers, dp: Group, ep: int, settings: Settings) -> None:
        """The shard that ``buffers`` has here; matrices travel over ``dp``, of which ``ep`` ranks
        have different experts."""
        self.buffers, self.bucket, self.settings = buffers, buffers.bucket, settings
        self._dp = dp
        self.exchange: Exchange | None = None
        kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if self.bucket.kind != "adamw":
            kinds = ("momentum",)
            self.exchange = plan_exchange(self.bucket, dp.index, ep)
        dtype = buffers.gradients.dtype
        own = buffers.parameter_shard
        # Where parameters are wide themselves they are their own master.
        self.master = own if own.dtype == dtype else own.to(dtype)
        self.state = {kind: torch.zeros_like(self.master) for kind in kinds}
        self._arrived = self._returned = own.new_empty(0)
        self._flight = Handle()

    @property
    def travels(self) -> bool:
        """Whether any rank sends a part of one of the bucket's matrices to another."""
        return self.exchange is not None and self.exchange.moves

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(kind, tensor [shard]) of everything a resume needs."""
        yield "master", self.master
        yield from self.state.items()

    def squared_norm(self) -> Tensor:
        """Sum of squares of the gradients' sums in this shard, float64."""
        blocks = torch.split(self.buffers.gradient_shard, NORM_ELEMENTS)
        norms = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
        return torch.stack(norms).square().sum()

    def round_master(self) -> None:
        """The parameters of this shard from their master."""
        own = self.buffers.parameter_shard
        if own.dtype != self.master.dtype:
            own.copy_(self.master)

    # --- Muon -----------------------------------------------------------------------------

    def send_updates(self) -> None:
        """Momentum on what travels, and its departure to the owners."""
        assert self.exchange is not None
        leaving = [self._update_direction(segment) for to in self.exchange.send for segment in to]
        dtype = self.settings.ns_dtype
        out = torch.cat(leaving) if leaving else self.master.new_empty(0, dtype=dtype)
        self._arrived = out.new_empty(_total(self.exchange.receive))
        self._returned = out
        self._flight = self._dp.all_to_all(
            self._arrived, out, _sizes(self.exchange.receive), _sizes(self.exchange.send)
        )

    def orthogonalize(self) -> None:
        """Newton-Schulz of what arrived, and its departure to where it came from."""
        assert self.exchange is not None
        self._flight.wait()
        parts: dict[_Key, list[tuple[slice, Segment]]] = defaultdict(list)
        position = 0
        for source in self.exchange.receive:
            for segment in source:
                here = slice(position, position + segment.stop - segment.start)
                parts[segment.ep_index, segment.matrix].append((here, segment))
                position = here.stop
        for (rows, cols), keys in self._by_shape(parts).items():
            stack = self._arrived.new_empty(len(keys), rows * cols)
            places = [
                (row, slice(s.start - offset, s.stop - offset), here)
                for row, key in zip(stack, keys, strict=True)
                for offset in [self.bucket.matrices[key[1]].offset]
                for here, s in parts[key]
            ]
            for row, there, here in places:
                row[there] = self._arrived[here]
            result = newton_schulz(
                stack.view(-1, rows, cols), self.settings.ns_table, self.settings.ns_dtype
            )
            stack.copy_(result.view_as(stack))
            for row, there, here in places:
                self._arrived[here] = row[there]
        self._flight = self._dp.all_to_all(
            self._returned,
            self._arrived,
            _sizes(self.exchange.send),
            _sizes(self.exchange.receive),
        )

    def update_matrices(self, lr: float) -> None:
        """Update whole matrices in place, and the parts of others with what came back."""
        assert self.exchange is not None
        muon_(self._local_stacks(), self.settings.muon(lr))
        if not self.travels:
            return
        self._flight.wait()
        position = 0
        for segment in (s for to in self.exchange.send for s in to):
            matrix = self.bucket.matrices[segment.matrix]
            size = segment.stop - segment.start
            scale = self.settings.update_rms * math.sqrt(max(matrix.rows, matrix.cols))
            master = self.master[self._within(segment.start, segment.stop)]
            master.mul_(1.0 - lr * self.settings.weight_decay)
            step = self._returned[position : position + size].to(master.dtype)
            master.add_(step, alpha=-lr * scale)
            position += size
        self._arrived = self._returned = self._returned.new_empty(0)

    def scale_rows(self, named: NamedRange, factors: Tensor) -> None:
        """Multiply the rows of a matrix, as far as they lie here, by ``factors`` [rows]."""
        low = max(named.start, self.buffers.own.start)
        high = min(named.stop, self.buffers.own.stop)
        if low >= high:
            return
        cols = named.shape[1]
        first, skip = divmod(low - named.start, cols)
        last = -(-(high - named.start) // cols)
        each = factors[first:last].to(self.master).repeat_interleave(cols)
        self.master[self._within(low, high)].mul_(each[skip : skip + high - low])

    def _update_direction(self, segment: Segment) -> Tensor:
        here = self._within(segment.start, segment.stop)
        momentum, grad = self.state["momentum"][here], self.buffers.gradient_shard[here]
        momentum.lerp_(grad, 1.0 - self.settings.momentum)
        ahead = grad.lerp(momentum, self.settings.momentum) if self.settings.nesterov else momentum
        return ahead.to(self.settings.ns_dtype)

    def _local_stacks(self) -> list[Stack]:
        """The matrices that are updated where they lie; neighbours of one shape as one stack."""
        assert self.exchange is not None
        runs: list[list[Matrix]] = []
        for number in self.exchange.local:
            matrix = self.bucket.matrices[number]
            last = runs[-1][-1] if runs else None
            follows = last is not None and last.stop == matrix.offset
            if (
                last is not None
                and follows
                and (last.rows, last.cols) == (matrix.rows, matrix.cols)
            ):
                runs[-1].append(matrix)
            else:
                runs.append([matrix])
        stacks = []
        for run in runs:
            here = self._within(run[0].offset, run[-1].stop)
            shape = (len(run), run[0].rows, run[0].cols)
            stacks.append(
                Stack(
                    self.master[here].view(shape),
                    self.buffers.gradient_shard[here].view(shape),
                    self.state["momentum"][here].view(shape),
                )
            )
        return stacks

    def _by_shape(self, keys: Iterable[_Key]) -> dict[tuple[int, int], list[_Key]]:
        shapes: dict[tuple[int, int], list[_Key]] = defaultdict(list)
        for key in sorted(keys):
            matrix = self.bucket.matrices[key[1]]
            shapes[matrix.rows, matrix.cols].append(key)
        return shapes

    def _within(self, start: int, stop: int) -> slice:
        """Elements of the bucket as elements of this shard."""
        first = self.buffers.own.start
        return slice(start - first, stop - first)


def _sizes(segments: tuple[tuple[Segment, ...], ...]) -> list[int]:
    """Elements for each rank."""
    return [sum(s.stop - s.start for s in rank) for rank in segments]


def _total(segments: tuple[tuple[Segment, ...], ...]) -> int:
    return sum(_sizes(segments))
