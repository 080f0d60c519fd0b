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
from kimi_pretrain.parallel.collectives import Group
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
    replicas: Group | None = None,
) -> Evaluation:
    """Loss of `model` on held-out (domain, batch) pairs, the same on every rank.

    `byte_lengths` [vocabulary] says how many bytes of text a token stands for; bits a byte
    do not depend on the tokenizer, so that runs with different ones compare. `replicas`
    share the batches out; every one of them must come here with the same ones.
    """
    replicas = replicas or Group("dp")
    parameter = next(model.parameters())
    record = StepRecord.for_model(
        model.config, tau=tau, exact=True, device=parameter.device, dtype=torch.float64
    )
    domains = list(dict.fromkeys(domain for domain, _ in batches))
    sums = torch.zeros(len(domains), 3, dtype=torch.float64)  # nats, labels, bytes of text
    # Experts on several ranks need as many forwards on each: who has none left repeats one.
    for number in range(-(-len(batches) // replicas.size)):
        index = number * replicas.size + replicas.index
        domain, batch = batches[index % len(batches)]
        rows = to_device(batch, slice(None), parameter.device)
        loss = model.loss(
            rows.tokens, rows.labels, record=record, document_ids=rows.document_ids, denominator=1
        )
        if index < len(batches):
            predicted = batch.labels[batch.labels >= 0]
            counted = [float(loss), len(predicted), int(byte_lengths[predicted].sum())]
            sums[domains.index(domain)] += torch.tensor(counted, dtype=torch.float64)
    sums = sums.to(parameter.device)
    for flight in (replicas.all_reduce_sum(sums), replicas.all_reduce_max(record.max_logits)):
        flight.wait()
    nats, labels, text_bytes = sums.sum(dim=0).tolist()
    return Evaluation(
        loss=nats / labels,
        bits_per_byte=nats / math.log(2) / text_bytes,
        domain_losses={
            domain: row[0] / row[1] for domain, row in zip(domains, sums.tolist(), strict=True)
        },
        max_logits=record.max_logits,
    )
