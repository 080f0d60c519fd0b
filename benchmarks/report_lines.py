"""What every benchmark prints around its figures: the machine, versions, both sides, ratio."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def print_header(title: str, packages: Sequence[str]) -> None:
    """Title, processor, threads and the versions of the packages on both sides."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"# {title}")
    print(f"machine: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"versions: python {platform.python_version()}, {versions}", flush=True)


def spread(values: Sequence[float]) -> str:
    """Median and range of `values`."""
    return f"{statistics.median(values):.4g} ({min(values):.4g}..{max(values):.4g})"


def paired_ratio(peer_seconds: Sequence[float], our_seconds: Sequence[float]) -> list[float]:
    """How many times faster ours is, pair by pair of neighbouring runs."""
    return [peer / ours for peer, ours in zip(peer_seconds, our_seconds, strict=True)]


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
