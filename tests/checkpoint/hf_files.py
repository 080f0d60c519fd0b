"""Hugging Face checkpoints as tests read, compare and change them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_pretrain.model.causal_lm import CausalLM


def weights_of(model: CausalLM) -> dict[str, Tensor]:
    return {**dict(model.hf_named_parameters()), **dict(model.hf_named_buffers())}


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by another reader than the one under test."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def edit(directory: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a one-file checkpoint."""
    tensors = stored(directory)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
