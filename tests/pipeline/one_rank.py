"""One rank of a pipeline in one process: its chunks, its batches, and peers that stand in."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config, rank_model
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.microbatch import DeviceBatch
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.collectives import Handle
from kimi_pretrain.parallel.dispatch import Dispatcher, LocalDispatcher
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.plan.stages import stage_layers
from tests.model.conftest import tiny_config

LENGTHS = (9, 5, 7)  # of the microbatches, whose tensors are told apart by them
FLOAT = torch.float64


def tiny(**changes: Any) -> ModelConfig:
    """One dense layer and three MoE layers."""
    return tiny_config(**({"num_hidden_layers": 4, "first_k_dense_replace": 1} | changes))


def chunks(
    config: ModelConfig, stages: int, mine: tuple[int, ...], dispatcher: Dispatcher | None = None
) -> RankModel:
    """The chunks of a rank that holds the stages ``mine``; every weight has a main gradient."""
    layers = stage_layers(config.num_hidden_layers, stages)
    model = rank_model(
        config,
        {stage: layers[stage] for stage in mine},
        FLOAT,
        "cpu",
        0,
        dispatcher or LocalDispatcher(),
    )
    for _, parameter in model.named_parameters():
        parameter.main_grad = torch.zeros_like(parameter, requires_grad=False)  # type: ignore[attr-defined]
    return model


def batches(config: ModelConfig, lengths: tuple[int, ...] = LENGTHS) -> list[DeviceBatch]:
    """[sequences 2, length] tokens of two documents each, some labels masked."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in lengths:
        tokens, labels = torch.randint(config.vocab_size, (2, 2, length), generator=generator)
        labels[0, : length // 2] = -100
        documents = torch.zeros(2, length, dtype=torch.int32)
        documents[1, length // 3 :] = 1
        found.append(DeviceBatch(tokens, labels, documents))
    return found


def labels_in(rows: list[DeviceBatch]) -> int:
    return int(sum((batch.labels >= 0).sum() for batch in rows))


def record(config: ModelConfig, microbatches: int) -> StepRecord:
    return StepRecord.for_model(config, tau=1.0, aux_scale=1 / microbatches, dtype=FLOAT)


def plain(config: ModelConfig, rows: list[DeviceBatch]) -> tuple[CausalLM, Tensor, StepRecord]:
    """The whole model after one autograd graph a microbatch, the loss and what was observed."""
    model, total = from_config(config, dtype=FLOAT), torch.zeros((), dtype=FLOAT)
    seen = record(config, len(rows))
    for batch in rows:
        loss = model.loss(batch.tokens, batch.labels, seen, batch.document_ids, labels_in(rows))
        loss.backward()
        total += loss.detach()
    return model, total, seen


class Operation(Handle):
    """In flight until it is awaited, as gloo's sends are."""

    def __init__(self, log: list[str], name: str, error: str = "") -> None:
        super().__init__()
        self.log, self.name, self.error, self.awaited = log, name, error, False

    @property
    def done(self) -> bool:
        return self.awaited

    def wait(self) -> None:
        if self.error:
            raise PeerError(self.error)
        if not self.awaited:
            self.log.append(f"await {self.name}")
        self.awaited = True


class StandIn:
    """A pipeline group whose other members send ones and take everything."""

    device = torch.device("cpu")

    def __init__(self, index: int = 0, size: int = 1, error: str = "") -> None:
        self.index, self.size, self.ranks = index, size, tuple(range(10, 10 + size))
        self.log: list[str] = []
        self.sent: list[tuple[int, Tensor]] = []
        self.error = error

    def send(self, tensor: Tensor, to: int) -> Handle:
        self.log.append(f"send to {to}")
        self.sent.append((to, tensor))
        return Operation(self.log, f"send to {to}")

    def receive(self, tensor: Tensor, source: int) -> Handle:
        self.log.append(f"receive from {source}")
        tensor.fill_(1.0)
        return Operation(self.log, f"receive from {source}", self.error)
