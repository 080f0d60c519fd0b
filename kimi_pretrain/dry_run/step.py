"""The training step with everything decided that values would decide."""

import torch
from torch import Tensor

from kimi_pretrain.config.schema import Config, ModelConfig
from kimi_pretrain.model.layer import Layer
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.world import World
from kimi_pretrain.train.step import TrainStep


def balanced_choice(scores: Tensor, bias: Tensor, cfg: ModelConfig) -> Tensor:
    """Experts that all get as many tokens, to one: [tokens, experts] scores to [tokens, k].

    The j-th choices of all tokens go to the j-th part of the experts. Real, on the host: counts,
    splits and routes follow from it as from a router's choice. Groups of experts
    (``model.n_group``) are not heeded: they decide which nodes a token goes to, not how many
    rows travel.
    """
    del bias
    tokens, experts, k = scores.shape[0], cfg.n_routed_experts, cfg.num_experts_per_tok
    slots = torch.arange(k * tokens) * experts // (k * tokens)
    return slots.view(k, tokens).t().contiguous()


def balance(model: RankModel) -> None:
    """Let every router of ``model`` choose evenly, whatever its scores are."""
    for chunk in model.chunks.values():
        for layer in chunk.model.layers.values():
            if isinstance(layer, Layer) and layer.router is not None:
                layer.router.choose = balanced_choice


class DryStep(TrainStep):
    """A step on tensors without memory; every head is clipped."""

    @classmethod
    def open(cls, config: Config, dtype: torch.dtype, world: World) -> "DryStep":
        step = super().open(config, dtype, world)
        assert isinstance(step, DryStep)
        balance(step.model)
        return step

    def empty_record(self, sequences: int) -> StepRecord:
        """As the step's own, with memory, and exact for every head.

        What it observes reads as ones, and the threshold lies below: every head is clipped.
        """
        record = super().empty_record(sequences)
        return StepRecord.for_model(
            self.config.model,
            tau=record.tau,
            exact=True,
            aux_scale=record.aux_scale,
            dtype=record.max_logits.dtype,
        )
