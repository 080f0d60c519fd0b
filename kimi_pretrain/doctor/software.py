"""Versions, the kernel behind every op, and the environment that libraries listen to."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kimi_pretrain import __version__
from kimi_pretrain.config.secrets import is_secret
from kimi_pretrain.ops.registry import explain

PACKAGES = (
    "numpy",
    "safetensors",
    "triton",
    "transformer-engine",
    "deep-ep",
    "nvidia-nccl-cu13",
    "nvidia-nccl-cu12",
    "nvidia-ml-py",
)
# Variables that change how a run computes or talks; others are nobody's business.
_HEARD = ("NCCL_", "GLOO_", "UCX_", "TORCH_", "CUDA_", "OMP_", "PYTORCH_", "NVSHMEM_", "FI_")


def versions() -> dict[str, str]:
    """Name -> version, of what is installed."""
    found = {
        "kimi_pretrain": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "torch": str(torch.__version__),
        "cuda of torch": torch.version.cuda or "none",
    }
    if torch.version.cuda is not None:
        nccl: Any = torch.cuda.nccl
        cudnn: Any = torch.backends.cudnn
        found["nccl of torch"] = ".".join(map(str, nccl.version()))
        found["cudnn of torch"] = str(cudnn.version())
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def kernels(choice: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Op -> which of its implementations a run with ``kernels=choice`` takes here, and why."""
    return explain(choice, device.type, dtype)


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that libraries of a run listen to; no secret is one of them."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_HEARD) and not is_secret(name)
    }
