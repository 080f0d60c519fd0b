"""Forwards alone through the stages of a pipeline: held-out loss and samples."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kimi_pretrain.model.microbatch import DeviceBatch, Microbatch
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import Dispatcher
from kimi_pretrain.pipeline.actions import Action, Kind
from kimi_pretrain.pipeline.mailbox import Mailbox
from kimi_pretrain.pipeline.passes import insert_p2p
from kimi_pretrain.pipeline.schedules import forward_only


class ForwardPipeline:
    """Runs a rank's chunks without keeping anything for backward."""

    def __init__(
        self,
        model: RankModel,
        dispatcher: Dispatcher,
        group: Group,
        placement: Sequence[int] = (0,),
    ) -> None:
        """Forwards of ``model`` over the ranks of a pipeline.

        ``placement`` says which of them holds each stage, as the schedule that trains them does.
        """
        self.model, self.dispatcher, self.group = model, dispatcher, group
        self.placement = placement

    @property
    def ends_here(self) -> bool:
        """Whether the last stage is on this rank."""
        return len(self.placement) - 1 in self.model.chunks

    @torch.no_grad()
    def run(
        self,
        batches: Sequence[DeviceBatch],
        record: StepRecord | None,
        last: Callable[[int, Tensor], None],
    ) -> None:
        """Every batch through all stages.

        Args:
            batches: the same on every rank of the pipeline.
            record: observes this rank's layers.
            last: on the rank of the last stage, called with a batch's number and its
                normalised hidden states [sequences, length, hidden].

        Raises:
            PeerError: another rank failed or did not answer in time.
        """
        pp, vpp = self.group.size, len(self.placement) // self.group.size
        schedule = insert_p2p(forward_only(pp, vpp, len(batches), placement=self.placement))
        shapes = [(*batch.tokens.shape, self.model.config.hidden_size) for batch in batches]
        mail = Mailbox(self.group, shapes, self.model.dtype, schedule.stages)
        for node in schedule.ranks[self.group.index]:
            assert isinstance(node, Action)
            stage, number = node.stage, node.microbatch
            key = ("activation", stage, number)
            following = ("activation", stage + 1, number)
            if node.kind is Kind.RECV_F:
                mail.post(key, schedule.placement[stage - 1])
            elif node.kind is Kind.SEND_F:
                mail.send(following, schedule.placement[stage + 1])
            else:
                x = batches[number].tokens if stage == 0 else mail.take(key)
                hidden = self._forward(stage, x, batches[number], record)
                if stage == schedule.stages - 1:
                    last(number, hidden)
                else:
                    mail.put(following, hidden)
        mail.close()

    def _forward(
        self, stage: int, x: Tensor, batch: DeviceBatch, record: StepRecord | None
    ) -> Tensor:
        chunk = self.model.chunks[stage]
        shared = Microbatch.build(
            self.model.config,
            batch.tokens.shape[1],
            self.model.dtype,
            batch.tokens.device,
            batch.document_ids,
            record,
        )
        return chunk.run(x, shared, self.dispatcher)
