"""How fast the machine is and how much of it a run uses (MFU)."""

import statistics
import time

import torch


def measure_matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matmul in `dtype`: the median of nine after two warm-ups.

    The reference for MFU where no data sheet gives the machine's peak (cluster=local).
    """
    size = 1024 if device.type == "cpu" else 8192  # large enough to hide a launch
    a = torch.rand(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])
