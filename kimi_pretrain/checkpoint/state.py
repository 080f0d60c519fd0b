"""Model and optimizer as named tensors, and back.

Every tensor goes by its global (Hugging Face) parameter name whatever the layout in
memory: a stack of experts is written as its matrices. Weights are the optimizer's masters
(fp32, or fp64), from which narrower parameters follow exactly.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from kimi_pretrain.checkpoint.store import CheckpointError
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.names import hf_views
from kimi_pretrain.optim.muon import MuonClip

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of all that a resume needs, detached from the live run."""

    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    state: dict[str, Any]


def snapshot(model: CausalLM, optimizer: MuonClip, state: dict[str, Any]) -> Snapshot:
    """Copy weights, optimizer state and `state` (plain JSON) as they are now."""
    weights = {
        name: _copy(tensor)
        for internal, tensor in _masters(model, optimizer).items()
        for name, tensor in hf_views(internal, tensor)
    }
    weights |= {name: _copy(buffer) for name, buffer in model.hf_named_buffers()}
    moments = {
        f"{kind}/{name}": _copy(view)
        for internal, kind, tensor in optimizer.named_state()
        if kind != "master"
        for name, view in hf_views(internal, tensor)
    }
    counts = {"steps": optimizer.steps, "last_clipped_step": optimizer.last_clipped_step}
    return Snapshot(weights, moments, {**state, "optimizer": counts})


def write(directory: Path, snapshot: Snapshot) -> None:
    """Write the files of one checkpoint into `directory`."""
    save_file(snapshot.weights, directory / WEIGHTS)
    save_file(snapshot.optimizer, directory / OPTIMIZER)
    (directory / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n")


def restore(directory: Path, model: CausalLM, optimizer: MuonClip) -> dict[str, Any]:
    """Load a verified checkpoint in place and return its state; bitwise what was saved.

    Raises CheckpointError when a tensor is missing or has another shape.
    """
    state: dict[str, Any] = json.loads((directory / STATE).read_text())
    optimizer.steps = state["optimizer"]["steps"]
    optimizer.last_clipped_step = state["optimizer"]["last_clipped_step"]
    masters = _masters(model, optimizer)
    with safe_open(directory / WEIGHTS, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for internal, master in masters.items():
            for name, view in hf_views(internal, master):
                _fill(view, name, file, names, directory / WEIGHTS)
        for name, buffer in model.hf_named_buffers():
            _fill(buffer, name, file, names, directory / WEIGHTS)
        for internal, parameter in model.named_parameters():
            if masters[internal] is not parameter:
                parameter.copy_(masters[internal])
    with safe_open(directory / OPTIMIZER, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for internal, kind, tensor in optimizer.named_state():
            if kind == "master":
                continue
            for name, view in hf_views(internal, tensor):
                _fill(view, f"{kind}/{name}", file, names, directory / OPTIMIZER)
    return state


def _masters(model: CausalLM, optimizer: MuonClip) -> dict[str, Tensor]:
    """The full-precision weight of every parameter: its master, or itself without one."""
    masters: dict[str, Tensor] = dict(model.named_parameters())
    masters |= {name: t for name, kind, t in optimizer.named_state() if kind == "master"}
    return masters


def _copy(tensor: Tensor) -> np.ndarray:
    copied: np.ndarray = tensor.detach().cpu().numpy().copy()
    return copied


def _fill(view: Tensor, name: str, file: Any, names: set[str], path: Path) -> None:
    if name not in names:
        raise CheckpointError(f"{path}: holds no {name}, which this model needs")
    loaded = file.get_tensor(name)
    if loaded.shape != view.shape:
        raise CheckpointError(
            f"{path}: {name} is {list(loaded.shape)}, this model needs {list(view.shape)}"
        )
    view.copy_(loaded)
