"""Every rank's step times and GPU readings brought together, once in so many steps."""

import math
import socket
from collections.abc import Mapping
from typing import Any

import torch

from kimi_pretrain.parallel.world import World
from kimi_pretrain.telemetry.breakdown import PARTS, Seat, comparison
from kimi_pretrain.telemetry.nvml import READINGS, Gpu, NoNvml, device_comparison

_COLUMNS = PARTS + READINGS


class Comparison:
    """Adds up this rank's steps until they are compared with the other ranks'.

    A comparison is one all-gather of 14 numbers a rank, out of the steps' time.
    """

    def __init__(self, world: World, gpu: Gpu | None) -> None:
        self._world, self._gpu = world, gpu
        hosts = world.everyone.gather_texts(socket.gethostname())
        self._seats = [
            Seat(host, world.topology.coordinates(rank).pp) for rank, host in enumerate(hosts)
        ]
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._steps = 0

    def add(self, parts: Mapping[str, float]) -> None:
        """Seconds by part of one more step."""
        for part in PARTS:
            self._sums[part] += parts.get(part, 0.0)
        self._steps += 1

    def row(self, step: int) -> dict[str, Any]:
        """A row of ranks.jsonl, of the steps since the last one. Collective.

        Raises:
            PeerError: another rank did not come.
        """
        values = [self._sums[part] / max(1, self._steps) for part in PARTS]
        reading = dict.fromkeys(READINGS, math.nan) if self._gpu is None else self._gpu.read()
        values += [reading[name] for name in READINGS]
        everyone = self._world.everyone
        mine = torch.tensor(values, dtype=torch.float64, device=everyone.device)
        table = mine.new_empty(everyone.size * len(values))
        everyone.all_gather(table, mine).wait()
        ranks = [
            dict(zip(_COLUMNS, row, strict=True))
            for row in table.view(everyone.size, -1).tolist()  # [ranks, columns]
        ]
        row = {"step": step, "steps": self._steps, **comparison(ranks, self._seats)}
        self._sums, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return row | device_comparison(ranks, self._seats)


def gpu_of(device: torch.device) -> tuple[Gpu | None, str]:
    """This rank's GPU to read, or None and why its readings will be missing ("": no GPU)."""
    if device.type != "cuda":
        return None, ""
    try:
        return Gpu.of_uuid(str(torch.cuda.get_device_properties(device).uuid)), ""
    except NoNvml as error:
        return None, f"no power, temperature, clocks and ECC of GPUs: {error}"
