"""The whole model on one rank."""

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.parallel.dispatch import Dispatcher, LocalDispatcher


class CausalLM(Chunk):
    """The chunk that holds every layer, with logits and loss.

    The dispatcher decides which experts this rank holds and brings tokens to the others'.
    """

    def __init__(
        self, cfg: ModelConfig, dtype: torch.dtype, dispatcher: Dispatcher | None = None
    ) -> None:
        self.dispatcher: Dispatcher
        dispatcher = dispatcher or LocalDispatcher()
        experts = dispatcher.experts(cfg.n_routed_experts)
        super().__init__(cfg, range(cfg.num_hidden_layers), dtype, experts)
        self.dispatcher = dispatcher

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of tokens [batch, length], fp32 (fp64 for fp64)."""
        hidden = self._hidden(tokens, None, None)
        logits: Tensor = self.lm_head(hidden)
        return logits.to(accumulate_dtype(logits.dtype))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        record: StepRecord | None = None,
        document_ids: Tensor | None = None,
        denominator: int | None = None,
    ) -> Tensor:
        """Cross entropy, nats.

        Args:
            tokens: [batch, length] int64.
            labels: [batch, length] int64, the token that follows; -100 takes no part.
            record: observes logit maxima, expert load and auxiliary loss; its ``aux_scale``
                scales the auxiliary loss's gradient, which is in the gradients but not in
                the value returned. Without a record there is no auxiliary loss.
            document_ids: [batch, length]; tokens attend within their document. None: each
                row is one document.
            denominator: of the sum over labels; by default how many labels take part.

        Returns:
            Scalar, fp32 (fp64 for fp64).
        """
        hidden = self._hidden(tokens, document_ids, record)
        if record is not None:
            record.tokens += tokens.numel()
        loss: Tensor = self.lm_head(hidden.flatten(0, 1), labels.flatten(), denominator)
        return loss

    def _hidden(
        self, tokens: Tensor, document_ids: Tensor | None, record: StepRecord | None
    ) -> Tensor:
        weight = self.lm_head.weight
        microbatch = Microbatch.build(
            self.config, tokens.shape[1], weight.dtype, weight.device, document_ids, record
        )
        return self.run(tokens, microbatch, self.dispatcher)
