"""Held-out loss: in nats a token, in bits a byte, and by domain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.train.step import to_device


@dataclass(frozen=True)
class Evaluation:
    """Losses are nats a label; `max_logits` [layers, heads] are exact maxima of the logits."""

    loss: float
    bits_per_byte: float
    domain_losses: dict[str, float]
    max_logits: Tensor


@torch.no_grad()
def evaluate(
    model: CausalLM,
    batches: Sequence[tuple[str, Batch]],
    byte_lengths: np.ndarray,
    tau: float | None,
) -> Evaluation:
    """Loss of `model` on held-out (domain, batch) pairs.

    `byte_lengths` [vocabulary] says how many bytes of text a token stands for; bits a byte
    do not depend on the tokenizer, so that runs with different ones compare.
    """
    parameter = next(model.parameters())
    record = StepRecord.for_model(
        model.config, tau=tau, exact=True, device=parameter.device, dtype=torch.float64
    )
    nats: dict[str, float] = {}
    labels: dict[str, int] = {}
    text_bytes = 0
    for domain, batch in batches:
        rows = to_device(batch, slice(None), parameter.device)
        loss = model.loss(
            rows.tokens, rows.labels, record=record, document_ids=rows.document_ids, denominator=1
        )
        predicted = batch.labels[batch.labels >= 0]
        nats[domain] = nats.get(domain, 0.0) + float(loss)
        labels[domain] = labels.get(domain, 0) + len(predicted)
        text_bytes += int(byte_lengths[predicted].sum())
    total = sum(nats.values())
    return Evaluation(
        loss=total / sum(labels.values()),
        bits_per_byte=total / math.log(2) / text_bytes,
        domain_losses={domain: nats[domain] / labels[domain] for domain in nats},
        max_logits=record.max_logits,
    )
