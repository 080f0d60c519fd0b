"""Training state as pieces: what a checkpoint asks of an optimizer, and MuonClip's answer."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.names import hf_views
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.optim.muon import MuonClip
from kimi_pretrain.optim.piece import Piece


@runtime_checkable
class PiecewiseState(Protocol):
    """An optimizer whose state, full-precision weights included, is held in pieces.

    Over the ranks of a run the pieces of every (kind, name) cover the tensor exactly once.
    """

    steps: int
    last_clipped_step: int | None

    def pieces(self) -> Iterator[Piece]:
        """This rank's share; the weights are of kind "master"."""

    def publish(self) -> None:
        """Make the model's parameters follow the masters, on every rank (collective)."""


class WholeState:
    """Model and MuonClip of a single process: every piece is a whole matrix or vector."""

    def __init__(self, model: Chunk, optimizer: MuonClip) -> None:
        self._model = model
        self._optimizer = optimizer

    @property
    def steps(self) -> int:
        """Steps done."""
        return self._optimizer.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._optimizer.steps = value

    @property
    def last_clipped_step(self) -> int | None:
        """The last step at which QK-Clip scaled a head."""
        return self._optimizer.last_clipped_step

    @last_clipped_step.setter
    def last_clipped_step(self, value: int | None) -> None:
        self._optimizer.last_clipped_step = value

    def pieces(self) -> Iterator[Piece]:
        """Weights, then moments."""
        for internal, master in self._masters().items():
            yield from _whole_pieces("master", internal, master)
        for internal, kind, tensor in self._optimizer.named_state():
            if kind != "master":
                yield from _whole_pieces(kind, internal, tensor)

    def publish(self) -> None:
        """Round the masters into the parameters."""
        masters = self._masters()
        with torch.no_grad():
            for internal, parameter in self._model.named_parameters():
                if masters[internal] is not parameter:
                    parameter.copy_(masters[internal])

    def _masters(self) -> dict[str, Tensor]:
        """The full-precision weight of every parameter: its master, or itself without one."""
        masters: dict[str, Tensor] = dict(self._model.named_parameters())
        state = self._optimizer.named_state()
        return masters | {name: tensor for name, kind, tensor in state if kind == "master"}


def piecewise(model: Chunk | RankModel, optimizer: MuonClip | PiecewiseState) -> PiecewiseState:
    """The state of either optimizer as pieces."""
    if isinstance(optimizer, PiecewiseState):
        return optimizer
    assert isinstance(model, Chunk)
    return WholeState(model, optimizer)


def _whole_pieces(kind: str, internal: str, tensor: Tensor) -> Iterator[Piece]:
    for name, view in hf_views(internal, tensor.detach()):
        yield Piece(kind, name, tuple(view.shape), 0, view.view(-1))
