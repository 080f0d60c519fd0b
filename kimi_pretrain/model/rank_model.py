"""The part of the model that one rank holds: one chunk a virtual pipeline stage."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.record import StepRecord


class RankModel:
    """Chunks by the number of their stage; names are the whole model's."""

    def __init__(self, config: ModelConfig, chunks: Mapping[int, Chunk]) -> None:
        self.config = config
        self.chunks = dict(sorted(chunks.items()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self._any_parameter.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._any_parameter.device

    @property
    def experts(self) -> range:
        """Which of a layer's routed experts this rank holds."""
        return next(iter(self.chunks.values())).experts

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), in the order in which forward uses them."""
        for chunk in self.chunks.values():
            yield from chunk.named_parameters()

    def hf_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As ``Chunk.hf_named_parameters``, of all chunks."""
        for chunk in self.chunks.values():
            yield from chunk.hf_named_parameters()

    def hf_named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As ``Chunk.hf_named_gradients``, of all chunks."""
        for chunk in self.chunks.values():
            yield from chunk.hf_named_gradients()

    def hf_named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """As ``Chunk.hf_named_buffers``, of all chunks."""
        for chunk in self.chunks.values():
            yield from chunk.hf_named_buffers()

    def update_router_bias(self, record: StepRecord, rate: float) -> None:
        """As ``Chunk.update_router_bias``, of all chunks."""
        for chunk in self.chunks.values():
            chunk.update_router_bias(record, rate)

    @property
    def _any_parameter(self) -> nn.Parameter:
        return next(parameter for _, parameter in self.named_parameters())
