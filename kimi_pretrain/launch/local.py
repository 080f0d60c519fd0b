"""All ranks of a run on this machine: ``torchrun --standalone``."""

from collections.abc import Sequence

from kimi_pretrain.launch.torchrun import run_ranks


def launch(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m module arguments`` as so many ranks; returns their exit code."""
    return run_ranks(module, arguments, ["--standalone", f"--nproc-per-node={ranks}"])
