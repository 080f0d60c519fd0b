"""What a rank holds at once, in bytes, as its row of a schedule adds and frees it."""

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_pretrain.pipeline.actions import BACKWARD, Kind, Schedule, leaves


@dataclass(frozen=True)
class Held:
    """The most that one rank holds at once."""

    device: float  # bytes
    host: float  # bytes that were offloaded and have not come back
    microbatches: int  # (stage, microbatch) on the device where the device holds most


def most_held(schedule: Schedule, rank: int, stage_bytes: Sequence[float]) -> Held:
    """Walks a rank's row, which is the order in which it computes: no clock is needed.

    Held from the start of F to the end of W (of the backward where there is no W). What is
    offloaded is still on the device during the next computation, and what comes back is there
    from when its PREFETCH stands.

    Args:
        schedule: with or without messages and offloads.
        rank: of the pipeline.
        stage_bytes: [stages] what one microbatch leaves on a stage.
    """
    row = schedule.ranks[rank]
    split = {
        (leaf.stage, leaf.microbatch)
        for node in row
        for leaf in leaves(node)
        if leaf.kind is Kind.W
    }
    device: dict[tuple[int, int], float] = {}
    leaving: list[tuple[int, int]] = []
    host = most_host = now = most = 0.0
    count = 0
    for node in row:
        freed: list[tuple[int, int]] = []
        computes = False
        for leaf in leaves(node):
            place = leaf.stage, leaf.microbatch
            size = stage_bytes[leaf.stage]
            if leaf.kind is Kind.F or leaf.kind is Kind.PREFETCH:
                device[place] = size
                now += size
                host -= size * (leaf.kind is Kind.PREFETCH)
            elif leaf.kind is Kind.OFFLOAD:
                leaving.append(place)
                host += size
            elif leaf.kind is Kind.W or (leaf.kind in BACKWARD and place not in split):
                freed.append(place)
            computes |= leaf.kind in (Kind.F, Kind.W) or leaf.kind in BACKWARD
        if now > most:
            most, count = now, len(device)
        most_host = max(most_host, host)
        if computes:  # the copies before this computation are done
            freed += leaving
            leaving = []
        for place in freed:
            now -= device.pop(place)
    return Held(most, most_host, count)
