"""What every rank observed in a step, made one: two packed all-reduces.

They start after the step's last forward and fly under its last backward. Maxima travel with
a second copy that holds the exact ones only, so that whether the largest value is exact
survives a plain MAX; counts and losses travel as one float64 vector (exact up to 2^53).
"""

import torch
from torch import Tensor

from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.collectives import Group


class Observations:
    """One step's record and loss on their way through a group."""

    def __init__(self, record: StepRecord, loss: Tensor, stop: bool, group: Group) -> None:
        """Start to combine; nothing of ``record`` is to change until ``combined``.

        Args:
            record: this rank's, after its last forward of the step.
            loss: scalar, the sum over this rank's microbatches.
            stop: whether this rank was asked to stop; one that was stops all.
            group: all ranks: replicas see other tokens, stages other layers.
        """
        self.record = record
        exact = record.max_logits.masked_fill(~record.exact, -torch.inf)
        self._maxima = torch.stack([record.max_logits, exact])  # [2, layers, heads]
        numbers = [loss.view(1), record.aux_loss, record.expert_counts.flatten()]
        others = torch.tensor([record.tokens, float(stop)], device=loss.device)
        self._sums = torch.cat([x.to(torch.float64) for x in [*numbers, others]])
        self._flights = [group.all_reduce_max(self._maxima), group.all_reduce_sum(self._sums)]

    def combined(self) -> tuple[float, bool]:
        """Fill the record with the group's; the loss of the global batch, whether to stop."""
        for flight in self._flights:
            flight.wait()
        record = self.record
        largest, exact = self._maxima
        record.max_logits.copy_(largest)
        record.exact.copy_((largest == exact) & torch.isfinite(exact))
        layers, counts = record.aux_loss.numel(), record.expert_counts
        loss, aux, slots, others = torch.split(self._sums, [1, layers, counts.numel(), 2])
        record.aux_loss.copy_(aux)
        counts.copy_(slots.view_as(counts))
        tokens, stops = others.tolist()
        record.tokens = int(tokens)
        return float(loss), stops > 0
