"""Loads the library of csrc/, once, and says why where it cannot."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from kimi_pretrain.ops.native.registration import register

NAMESPACE = "kimi_pretrain"
LIBRARY = Path(__file__).with_name("_kernels.so")


@cache
def missing() -> str | None:
    """Loads the library and gives None, or says in a few words why there is none."""
    if not LIBRARY.is_file():
        return "it was not built (docs/kernels.md says when and how)"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:  # built for another torch or another machine
        return f"the library does not load: {error}"
    register()
    return None


def obstacle(ops: Sequence[str], device: str) -> str | None:
    """Why the library cannot run all of ``ops`` on ``device``, or None."""
    absent = missing()
    if absent is not None:
        return absent
    if all(has_kernel(op, device) for op in ops):
        return None
    return f"the library was built without it for {device}"


def has_kernel(op: str, device: str) -> bool:
    """Whether the loaded library holds ``op`` for ``device``, "cpu" or "cuda"."""
    key = device.upper()
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)
    return bool(found)
