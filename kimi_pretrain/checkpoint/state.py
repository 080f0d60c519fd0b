"""Model and optimizer as named tensors, and back, at any number of ranks on either side.

Every tensor goes by its global (Hugging Face) parameter name whatever the layout in
memory: a stack of experts is written as its matrices. Weights are the optimizer's masters
(fp32, or fp64), from which narrower parameters follow exactly. Every rank writes the pieces
that it owns and reads the ranges that it needs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kimi_pretrain.checkpoint.part_files import PartFiles, Shape, file_name, key_of, write_tensors
from kimi_pretrain.checkpoint.pieces import PiecewiseState, piecewise
from kimi_pretrain.checkpoint.store import CheckpointError
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.optim.muon import MuonClip

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
STATE = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of what a rank writes, detached from the live run.

    `weights` and `optimizer` are by key: a whole tensor in its shape, a part as a vector.
    """

    weights: dict[str, NDArray[Any]]
    optimizer: dict[str, NDArray[Any]]
    shapes: dict[str, dict[str, Shape]]  # stem -> name -> shape, of tensors held in part
    state: dict[str, Any]  # written by rank 0
    rank: int = 0
    world: int = 1


def snapshot(
    model: Chunk | RankModel,
    optimizer: MuonClip | PiecewiseState,
    state: dict[str, Any],
    rank: int = 0,
    world: int = 1,
    buffers_too: bool | None = None,
) -> Snapshot:
    """Copy this rank's share of weights and optimizer state, and `state` (plain JSON), as now.

    The model's buffers are the same on every replica: one of them, the rank with
    `buffers_too` (by default rank 0), has them in its share.
    """
    held = piecewise(model, optimizer)
    tensors: dict[str, dict[str, NDArray[Any]]] = {WEIGHTS: {}, OPTIMIZER: {}}
    shapes: dict[str, dict[str, Shape]] = {WEIGHTS: {}, OPTIMIZER: {}}
    for kind, name, shape, start, values in held.pieces():
        if values.numel() == 0:
            continue
        stem, stored = _place(kind, name)
        key = key_of(stored, shape, start, values.numel())
        if key in tensors[stem]:
            raise ValueError(f"rank {rank} holds {key} of {stem} twice")
        whole = key == stored
        tensors[stem][key] = _copy(values).reshape(shape if whole else (-1,))
        if not whole:
            shapes[stem][stored] = shape
    if rank == 0 if buffers_too is None else buffers_too:
        buffers = model.hf_named_buffers()
        tensors[WEIGHTS] |= {name: _copy(buffer) for name, buffer in buffers}
    counts = {"steps": held.steps, "last_clipped_step": held.last_clipped_step}
    full_state = {**state, "optimizer": counts}
    return Snapshot(tensors[WEIGHTS], tensors[OPTIMIZER], shapes, full_state, rank, world)


def write(directory: Path, snapshot: Snapshot) -> list[str]:
    """Write a rank's files of one checkpoint into `directory`; returns their names."""
    names = []
    for stem, tensors in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.optimizer)):
        names.append(file_name(stem, snapshot.rank, snapshot.world))
        write_tensors(directory / names[-1], tensors, snapshot.shapes[stem])
    if snapshot.rank == 0:
        (directory / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n")
        names.append(STATE)
    return names


def restore(
    directory: Path, model: Chunk | RankModel, optimizer: MuonClip | PiecewiseState
) -> dict[str, Any]:
    """Load a verified checkpoint in place and return its state; bitwise what was saved.

    Every rank calls it, since it ends in a collective (`publish`). Where one rank's failure
    should be agreed on first, call `load`, agree, then `optimizer.publish()`.

    Raises:
        CheckpointError: as `load`.
    """
    state = load(directory, model, optimizer)
    piecewise(model, optimizer).publish()
    return state


def load(
    directory: Path, model: Chunk | RankModel, optimizer: MuonClip | PiecewiseState
) -> dict[str, Any]:
    """`restore` without its collective: parameters do not follow their masters yet.

    Raises:
        CheckpointError: a file or tensor is missing, a tensor has another shape, or the
            files do not hold each of its elements exactly once; names file, tensor, numbers.
    """
    state = read_state(directory)
    held = piecewise(model, optimizer)
    with (
        torch.no_grad(),
        PartFiles(directory, WEIGHTS) as weights,
        PartFiles(directory, OPTIMIZER) as moments,
    ):
        files = {WEIGHTS: weights, OPTIMIZER: moments}
        for kind, name, shape, start, values in held.pieces():
            stem, stored = _place(kind, name)
            files[stem].fill(stored, shape, start, values)
        for name, buffer in model.hf_named_buffers():
            weights.fill(name, tuple(buffer.shape), 0, buffer.view(-1))
    held.steps = state["optimizer"]["steps"]
    held.last_clipped_step = state["optimizer"]["last_clipped_step"]
    return state


def read_state(directory: Path) -> dict[str, Any]:
    """The JSON that `snapshot` was given, with the optimizer's counters.

    Raises:
        CheckpointError: there is none.
    """
    try:
        state: dict[str, Any] = json.loads((directory / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / STATE}: not readable ({error})") from error
    return state


def _place(kind: str, name: str) -> tuple[str, str]:
    """The stem of the files, and the name in them, of a piece."""
    return (WEIGHTS, name) if kind == "master" else (OPTIMIZER, f"{kind}/{name}")


def _copy(tensor: Tensor) -> NDArray[Any]:
    copied: NDArray[Any] = tensor.detach().to("cpu", copy=True).numpy()
    return copied
