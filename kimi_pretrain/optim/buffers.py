"""Parameters and main gradients in flat buffers, reduced and gathered bucket by bucket.

A bucket's parameters lie in one flat buffer in the compute dtype and their gradients in one
in fp32 (fp64), both laid out by ``optim.layout``: rank r of the bucket's group owns the r-th
even part. During the last microbatch every parameter reports its gradient; the bucket whose
last one came in starts its reduce-scatter at once, under the rest of backward. After the
update the owner's part of the parameters travels to everyone, and a module waits for its
own parameters only when it is called: the all-gather runs under the next forward.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.optim.buckets import Bucket, Layout
from kimi_pretrain.optim.piece import named_ranges
from kimi_pretrain.parallel.collectives import Group, Handle


class BucketBuffers:
    """The memory of one bucket on one rank, and what is in flight in it."""

    def __init__(
        self, bucket: Bucket, group: Group, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bucket, self.group = bucket, group
        high = accumulate_dtype(dtype)
        self.parameters = torch.zeros(bucket.size, dtype=dtype, device=device)
        self.gradients = torch.zeros(bucket.size, dtype=high, device=device)
        self.own = slice(group.index * bucket.shard, (group.index + 1) * bucket.shard)
        # Each tensor's range here, and whether what this rank itself gave to its sum was finite.
        self._own_finite: dict[tuple[int, int], Tensor] = {}
        ranges = (self._held(start, stop) for _, _, start, stop in named_ranges(bucket, 0))
        self._own_ranges = [(low, high) for low, high in ranges if low < high]
        self._missing = 0  # gradients of the step that are still to come
        self._reduction: Handle | None = None
        self._gather: Handle | None = None

    @property
    def parameter_shard(self) -> Tensor:
        """[shard] in the compute dtype, a view."""
        return self.parameters[self.own]

    @property
    def gradient_shard(self) -> Tensor:
        """[shard] fp32 (fp64), a view; after ``reduced`` the sum over the group."""
        return self.gradients[self.own]

    def expect(self, microbatches: int) -> None:
        """A step begins: as many gradients of every parameter will come."""
        self._missing = microbatches * len(self.bucket.slots)

    def delivered(self) -> None:
        """One parameter's gradient of one microbatch is in."""
        self._missing -= 1
        if self._missing == 0:
            self._reduce()

    def reduced(self) -> None:
        """Return when the group's sum is in ``gradient_shard``."""
        if self._missing != 0:
            wrong = "never came" if self._missing > 0 else "came after its reduction had begun"
            raise RuntimeError(
                f"{abs(self._missing)} gradients of a bucket that holds "
                f"{self.bucket.slots[0].spec.name} {wrong}"
            )
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None

    def gather(self) -> None:
        """Start to send this rank's part of the parameters to everyone."""
        if self.group.size > 1:
            self._gather = self.group.all_gather(self.parameters, self.parameter_shard)

    def gathered(self) -> None:
        """Return when everyone's part is here."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None

    def gave_finite(self, start: int, stop: int) -> bool:
        """Whether this rank's own gradient of the tensor at [start, stop) was finite.

        Outside the rank's shard it is still there to see. Inside lies the group's sum, and
        what the rank gave to it was noted before.
        """
        low, high = self._held(start, stop)
        noted = self._own_finite.get((low, high))
        if noted is None:
            return self._finite(start, stop)
        return bool(noted) and self._finite(start, low) and self._finite(high, stop)

    def _finite(self, start: int, stop: int) -> bool:
        return bool(torch.isfinite(self.gradients[start:stop]).all())

    def _held(self, start: int, stop: int) -> tuple[int, int]:
        """What of the elements [start, stop) lies in this rank's shard; low >= high: nothing."""
        return max(start, self.own.start), min(stop, self.own.stop)

    def _reduce(self) -> None:
        if self.group.size > 1:
            # The sum will lie where this rank's own contribution does: note what that was.
            self._own_finite = {
                (low, high): torch.isfinite(self.gradients[low:high]).all()
                for low, high in self._own_ranges
            }
        self._reduction = self.group.reduce_scatter(self.gradient_shard, self.gradients)


class ShardedBuffers:
    """All buckets of a rank; moves a model's parameters into them."""

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        layout: Layout,
        groups: Mapping[str, Group],
    ) -> None:
        """Buffers for ``named_parameters``, whose values are kept.

        Args:
            named_parameters: by the names that the layout's specs have.
            layout: which parameter lies where.
            groups: the "edp" and the "dp" group.
        """
        self.layout = layout
        self.buckets: list[BucketBuffers] = []
        self._home: dict[str, BucketBuffers] = {}
        first = next(iter(named_parameters.values()))
        for bucket in layout.buckets:
            buffers = BucketBuffers(bucket, groups[bucket.group], first.dtype, first.device)
            self.buckets.append(buffers)
            for slot in bucket.slots:
                parameter = named_parameters[slot.spec.name]
                part = slice(slot.offset, slot.offset + math.prod(slot.spec.shape))
                view = buffers.parameters[part].view(slot.spec.shape)
                with torch.no_grad():
                    view.copy_(parameter)
                parameter.data = view
                parameter.main_grad = buffers.gradients[part].view(slot.spec.shape)  # type: ignore[attr-defined]
                parameter.main_grad_ready = buffers.delivered  # type: ignore[attr-defined]
                self._home[slot.spec.name] = buffers

    def zero(self) -> None:
        """Forget the gradients."""
        for buffers in self.buckets:
            buffers.gradients.zero_()

    def expect(self, microbatches: int) -> None:
        """A step of so many microbatches begins: reduce a bucket when all it waits for is in."""
        for buffers in self.buckets:
            buffers.expect(microbatches)

    def reduced(self) -> None:
        """Return when every bucket's sum is in its shard.

        Raises:
            RuntimeError: a parameter took no part in some microbatch, or twice in one.
        """
        for buffers in self.buckets:
            buffers.reduced()

    def gathered(self) -> None:
        """Return when every parameter is what its owner made it."""
        for buffers in self.buckets:
            buffers.gathered()

    def gate(self, model: nn.Module) -> None:
        """Let every module that owns parameters wait for them, and no longer, when called."""
        for path, module in model.named_modules():
            names = [f"{path}.{n}" for n, _ in module.named_parameters(recurse=False)]
            homes = list(dict.fromkeys(self._home[name] for name in names))
            if any(buffers.group.size > 1 for buffers in homes):
                module.register_forward_pre_hook(partial(_wait_for, homes))

    def nonfinite(self, first_expert: int = 0) -> list[str]:
        """Names of the tensors whose gradient from this rank held a NaN or an infinity.

        Another rank's is no reason to be named, whoever holds the sum.
        """
        return [
            name
            for buffers in self.buckets
            for name, _, start, stop in named_ranges(buffers.bucket, first_expert)
            if not buffers.gave_finite(start, stop)
        ]


def _wait_for(homes: Sequence[BucketBuffers], module: nn.Module, arguments: object) -> None:
    del module, arguments
    for buffers in homes:
        buffers.gathered()
