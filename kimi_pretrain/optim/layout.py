"""The pure layout function of ZeRO-1 MuonClip: which parameter lies where (design 4.5).

Experts lie so that each replica holds whole matrices: one reduce-scatter brings it whole
gradients, Newton-Schulz needs no further communication. K2 has 36 dense matrices a stage and
up to 128 replicas; whole matrices would pad their buffers 12.7 times, so they are cut into
even shards and travel to an owner and back. What AdamW updates may be cut anywhere.
"""

from collections.abc import Iterable, Sequence
from math import prod

from kimi_pretrain.optim.buckets import Bucket, Layout, Matrix, Part, Slot, Spec
from kimi_pretrain.optim.ownership import assign_owners

__all__ = [
    "DENSE_PADDING",
    "Bucket",
    "Layout",
    "Matrix",
    "Part",
    "Slot",
    "Spec",
    "plan_layout",
]

# Dense matrices lie whole on their owners where that makes their buffers at most this large.
DENSE_PADDING = 1.1


def plan_layout(
    specs: Iterable[Spec],
    edp: int,
    ep: int,
    dense: str = "auto",
    bucket_elements: int = 40_000_000,
) -> Layout:
    """The buckets of one pipeline stage and the owners of its matrices.

    Args:
        specs: the stage's parameters in the order in which forward uses them.
        edp: replicas of an expert's shard.
        ep: ranks of an expert-parallel group.
        dense: how Muon's matrices outside the experts are sharded over dp: ``aligned`` (whole
            matrices), ``flat`` (even shards), or ``auto``: aligned where the padding is at
            most ``DENSE_PADDING``.
        bucket_elements: parameters are merged into buckets of at least this many, as long as
            there are more.

    Returns:
        The same layout for the same arguments, whichever rank asks.

    Raises:
        ValueError: a name for the second time, an empty parameter, a vector for Muon, or an
            unknown ``dense``.
    """
    backward = _checked(specs)[::-1]
    experts = [s for s in backward if s.muon and s.expert]
    matrices = [s for s in backward if s.muon and not s.expert]
    if dense not in ("auto", "flat", "aligned"):
        raise ValueError(f"dense is auto, flat or aligned, not {dense}")
    dp = edp * ep
    whole = [_aligned("dp", dp, run) for run in _by_shape(matrices)]
    if dense == "auto":
        fits = sum(b.size for b in whole) <= DENSE_PADDING * sum(b.elements for b in whole)
        dense = "aligned" if fits else "flat"
    buckets = [
        _aligned("edp", edp, run)
        for shape in _by_shape(experts)
        for run in _whole_runs(shape, edp, bucket_elements)
    ]
    if dense == "aligned":
        buckets += whole
    else:
        buckets += [_even("dp", dp, "flat", run) for run in _runs(matrices, bucket_elements)]
    for group, ranks, expert in (("edp", edp, True), ("dp", dp, False)):
        rest = [s for s in backward if not s.muon and s.expert == expert]
        buckets += [_even(group, ranks, "adamw", run) for run in _runs(rest, bucket_elements)]
    # Backward has finished a bucket when it has finished the last of its slots.
    done = {spec.name: place for place, spec in enumerate(backward)}
    buckets.sort(key=lambda bucket: done[bucket.slots[-1].spec.name])
    return Layout(edp, ep, assign_owners(buckets, edp, ep))


def _checked(specs: Iterable[Spec]) -> list[Spec]:
    checked: dict[str, Spec] = {}
    for spec in specs:
        if spec.name in checked:
            raise ValueError(f"{spec.name} comes twice")
        if spec.elements < 1 or (spec.muon and len(spec.shape) < 2):
            raise ValueError(f"{spec.name} of shape {spec.shape} cannot be laid out")
        checked[spec.name] = spec
    return list(checked.values())


def _by_shape(specs: Sequence[Spec]) -> list[list[Spec]]:
    """The parameters of each matrix shape, order kept."""
    shapes: dict[tuple[int, int], list[Spec]] = {}
    for spec in specs:
        shapes.setdefault(spec.matrix, []).append(spec)
    return list(shapes.values())


def _runs(specs: Sequence[Spec], bucket_elements: int) -> list[list[Spec]]:
    """Consecutive parameters, together at least ``bucket_elements``; the last run may be less."""
    return _whole_runs(specs, 1, bucket_elements)


def _whole_runs(specs: Sequence[Spec], ranks: int, bucket_elements: int) -> list[list[Spec]]:
    """Runs as of ``_runs`` whose matrices (of one shape) also divide over ``ranks``.

    Only the last may not divide. Every run before divides, so merging it into one of them
    would not change its padding.
    """
    runs: list[list[Spec]] = [[]]
    elements = 0
    for spec in specs:
        runs[-1].append(spec)
        elements += spec.elements
        if elements >= bucket_elements and (
            ranks == 1 or elements // prod(spec.matrix) % ranks == 0
        ):
            runs.append([])
            elements = 0
    return [run for run in runs if run]


def _aligned(group: str, ranks: int, specs: Sequence[Spec]) -> Bucket:
    """A bucket of matrices of one shape, padded so that every rank holds whole ones."""
    return _bucket(group, ranks, "aligned", specs, prod(specs[0].matrix))


def _even(group: str, ranks: int, kind: str, specs: Sequence[Spec]) -> Bucket:
    """A bucket padded to a multiple of the ranks."""
    return _bucket(group, ranks, kind, specs, 1)


def _bucket(group: str, ranks: int, kind: str, specs: Sequence[Spec], unit: int) -> Bucket:
    """Slots one after another; the shard is a multiple of ``unit`` elements."""
    slots, stop = [], 0
    for spec in specs:
        slots.append(Slot(spec, stop))
        stop += spec.elements
    shard = -(-stop // (ranks * unit)) * unit
    return Bucket(group, ranks, kind, tuple(slots), shard * ranks)
