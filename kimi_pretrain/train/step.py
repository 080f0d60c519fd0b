"""One optimizer step: microbatches forwards and backwards, guards, clip, update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.optim.muon import MuonClip
from kimi_pretrain.train.gradients import MainGradients
from kimi_pretrain.train.guards import require_finite


@dataclass(frozen=True)
class StepResult:
    """What one step measured. `record` holds the per-layer arrays."""

    loss: float  # nats a label, mean over the global batch
    grad_norm: float  # global, before clipping
    record: StepRecord


@dataclass(frozen=True)
class DeviceBatch:
    """A slice of a Batch as tensors on the device of the model; int64 tokens and labels."""

    tokens: Tensor  # [sequences, S]
    labels: Tensor  # [sequences, S], -100 where nothing is to be predicted
    document_ids: Tensor | None  # [sequences, S] int32


def to_device(batch: Batch, rows: slice, device: torch.device) -> DeviceBatch:
    """The chosen rows of `batch` as tensors."""
    documents = batch.document_ids
    return DeviceBatch(
        tokens=torch.from_numpy(batch.tokens[rows]).to(device),
        labels=torch.from_numpy(batch.labels[rows]).to(device),
        document_ids=None if documents is None else torch.from_numpy(documents[rows]).to(device),
    )


class TrainStep:
    """Runs the steps of one model with one optimizer; holds nothing else between steps."""

    def __init__(self, config: Config, model: CausalLM, optimizer: MuonClip) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.gradients = MainGradients(model.named_parameters())
        self.device = next(model.parameters()).device

    def run(self, step: int, batch: Batch, learning_rate: float) -> StepResult:
        """Accumulate the gradients of `batch`, then update the weights once.

        Raises GuardStop, with the weights untouched, when the loss or a gradient is not
        finite. Every microbatch divides by the number of labels of the whole batch, so
        that the result does not depend on how the batch is cut.
        """
        record, loss = self._accumulate(batch)
        norm = self.gradients.norm()
        require_finite(
            step,
            loss,
            float(norm),
            [] if torch.isfinite(norm) else self.gradients.nonfinite(),
        )
        self.gradients.clip(norm, self.config.optimizer.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.observe_max_logits(record.max_logits, record.exact)
        self.optimizer.step()
        self.model.update_router_bias(record, self.config.optimizer.router_bias_rate)
        return StepResult(loss=loss, grad_norm=float(norm), record=record)

    def _accumulate(self, batch: Batch) -> tuple[StepRecord, float]:
        size = self.config.schedule.micro_batch_size
        sequences = len(batch.tokens)
        labels = int((batch.labels >= 0).sum())
        record = StepRecord.for_model(
            self.config.model,
            tau=self.config.optimizer.qk_clip_threshold,
            aux_scale=size / sequences,
            device=self.device,
            dtype=self.gradients.flat.dtype,
        )
        self.gradients.zero()
        total = torch.zeros((), dtype=self.gradients.flat.dtype, device=self.device)
        for first in range(0, sequences, size):
            micro = to_device(batch, slice(first, first + size), self.device)
            loss = self.model.loss(
                micro.tokens,
                micro.labels,
                record=record,
                document_ids=micro.document_ids,
                denominator=labels,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return record, float(total)
