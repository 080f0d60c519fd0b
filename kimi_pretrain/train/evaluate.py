"""Held-out loss: in nats a token, in bits a byte, and by domain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.train.step import to_device


@dataclass(frozen=True)
class Evaluation:
    """Losses are nats a label; `max_logits` [layers, heads] are exact maxima of the logits."""

    loss: float
    bits_per_byte: float
    domain_losses: dict[str, float]
    max_logits: Tensor


def evaluate(
    forward: ForwardPipeline,
    batches: Sequence[tuple[str, Batch]],
    byte_lengths: NDArray[Any],
    tau: float | None,
    replicas: Group,
    everyone: Group,
) -> Evaluation:
    """Loss of a model on held-out (domain, batch) pairs, the same on every rank.

    `byte_lengths` [vocabulary] says how many bytes of text a token stands for; bits a byte
    do not depend on the tokenizer, so that runs with different ones compare. `replicas`
    share the batches out; every rank comes here with the same ones.
    """
    model = forward.model
    record = StepRecord.for_model(
        model.config, tau=tau, exact=True, device=model.device, dtype=torch.float64
    )
    # Experts on several ranks need as many forwards on each: who has none left repeats one.
    numbers = range(
        replicas.index, -(-len(batches) // replicas.size) * replicas.size, replicas.size
    )
    mine = [batches[number % len(batches)] for number in numbers]
    rows = [to_device(batch, slice(None), model.device) for _, batch in mine]
    domains = list(dict.fromkeys(domain for domain, _ in batches))
    sums = torch.zeros(len(domains), 3, dtype=torch.float64, device=model.device)

    def add(index: int, hidden: Tensor) -> None:
        """Nats, labels and bytes of one batch; on the rank of the last stage."""
        if numbers[index] >= len(batches):
            return
        domain, batch = mine[index]
        head = model.chunks[max(model.chunks)].lm_head
        nats = head(hidden.flatten(0, 1), rows[index].labels.flatten(), 1)
        predicted = batch.labels[batch.labels >= 0]
        counted = [float(nats), len(predicted), int(byte_lengths[predicted].sum())]
        sums[domains.index(domain)] += sums.new_tensor(counted)

    forward.run(rows, record, add)
    for flight in (everyone.all_reduce_sum(sums), everyone.all_reduce_max(record.max_logits)):
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
