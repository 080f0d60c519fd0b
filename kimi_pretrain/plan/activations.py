"""What a stage keeps of a microbatch for its backward, by tag and segment.

``operations`` says what is saved; a policy says which of it is computed again and takes nothing,
which lies in FP8 with a scale for 128 values, and which in the host's memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kimi_pretrain.config.activation import Policy
from kimi_pretrain.plan.backward import Backward, backward_of, kept_size, living
from kimi_pretrain.plan.operations import (
    Segment,
    Setting,
    Stored,
    embedding_operations,
    head_operations,
    layer_operations,
)

__all__ = [
    "Kept",
    "Setting",
    "layer_kept",
    "layer_leaves",
    "layer_phases",
    "stage_kept",
]

Sizes = dict[str, float]  # bytes by tag

_KEEP = Policy()


@dataclass(frozen=True)
class Kept:
    """Bytes that one microbatch leaves on a stage for its backward, by tag."""

    stays: Sizes  # on the device
    leaves: Sizes  # for the host, where the schedule has the time
    again: Sizes  # nowhere: computed again
    forward: tuple[float, ...]  # what each segment of a forward adds to the first two
    backward: Callable[[bool, bool], Backward]  # computed again ahead of it; W by itself

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        policies: Mapping[str, Policy],
        tokens: float = 1.0,
        only: str | None = None,
    ) -> "Kept":
        """What policies make of tensors as they are saved.

        Args:
            segments: of the stage, in the order of its forward.
            policies: by tag; a tag that is not in it is kept as it is.
            tokens: of a microbatch.
            only: count tensors of this tag (backward.py: or beside the tags); None: everything.
        """
        stays, leaves, again = Sizes(), Sizes(), Sizes()

        def policy(stored: Stored) -> Policy:
            return policies.get(stored.tag, _KEEP)

        alive = living(segments, policy)
        forward, seen = [], set[Stored]()
        for segment in segments:
            added = 0.0
            for operation in segment:
                for stored in (*operation.reads, *operation.saves):
                    if stored in seen or stored not in alive or only not in (None, stored.tag):
                        continue
                    seen.add(stored)
                    how, size = policy(stored), tokens * kept_size(stored, policy(stored))
                    if how.recompute:
                        _add(again, stored.tag, tokens * stored.size)
                    elif size:
                        _add(leaves if how.offload else stays, stored.tag, size)
                    added += size
            forward.append(added)
        follow = partial(_follow, segments, policy, tokens, only, {})
        return cls(stays, leaves, again, tuple(forward), follow)

    @property
    def device(self) -> float:
        """What never leaves."""
        return sum(self.stays.values())

    @property
    def host(self) -> float:
        """What may leave."""
        return sum(self.leaves.values())

    @property
    def total(self) -> float:
        return self.device + self.host


def layer_kept(setting: Setting, moe: bool) -> Sizes:
    """Bytes a token that one layer keeps, on the device or the host."""
    kept = Kept.of(layer_operations(setting, moe), setting.policies)
    return kept.stays | kept.leaves


def layer_leaves(setting: Setting, moe: bool) -> float:
    """Bytes a token of one layer that may leave the device."""
    return Kept.of(layer_operations(setting, moe), setting.policies).host


def layer_phases(setting: Setting, moe: bool) -> list[Sizes]:
    """Bytes a token of one layer by tag, as they are saved in each of its phases."""
    phases, seen = [], set[Stored]()
    for segment in layer_operations(setting, moe):
        sizes = Sizes()
        for operation in segment:
            for stored in (*operation.reads, *operation.saves):
                if stored not in seen:
                    _add(sizes, stored.tag, stored.size)
                    seen.add(stored)
        phases.append(sizes)
    return phases


def stage_kept(setting: Setting, layers: range, only: str | None = None) -> Kept:
    """What one microbatch leaves on a stage for its backward.

    ``only``: count tensors of this tag (backward.py: or beside the tags); None: everything.
    """
    return Kept.of(_stage(setting, layers), setting.policies, setting.tokens, only)


def _stage(setting: Setting, layers: range) -> list[Segment]:
    """Its segments: rows that fly are what parts them."""
    model = setting.model
    segments: list[Segment] = [embedding_operations() if layers.start == 0 else []]
    for layer in layers:
        first, *rest = layer_operations(setting, layer >= model.first_k_dense_replace)
        segments[-1] += first
        segments += rest
    if layers.stop == model.num_hidden_layers:
        segments[-1] += head_operations(setting)
    return segments


def _follow(
    segments: Sequence[Segment],
    policy: Callable[[Stored], Policy],
    tokens: float,
    only: str | None,
    known: dict[tuple[bool, bool], Backward],
    ahead: bool,
    split: bool,
) -> Backward:
    """``backward_of``, once for each way of going through it."""
    if (ahead, split) not in known:
        known[ahead, split] = backward_of(segments, policy, tokens, only, ahead=ahead, split=split)
    return known[ahead, split]


def _add(total: Sizes, tag: str, size: float) -> None:
    total[tag] = total.get(tag, 0.0) + size
