"""The layers of one virtual pipeline stage."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.layer import Layer
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.names import hf_views
from kimi_pretrain.model.norm import RMSNorm
from kimi_pretrain.model.projection import Head
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.router import update_bias
from kimi_pretrain.ops.embedding import embedding
from kimi_pretrain.ops.saved import named
from kimi_pretrain.parallel.dispatch import Dispatcher


class Embedding(nn.Module):
    """``embed_tokens``."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        named("tokens", tokens)
        return embedding(tokens, self.weight)


class Backbone(nn.Module):
    """``model``: embedding (first chunk), layers by their global index, final norm (last chunk)."""

    def __init__(self, cfg: ModelConfig, layers: range, dtype: torch.dtype, experts: range) -> None:
        super().__init__()
        if layers.start == 0:
            self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, dtype)
        self.layers = nn.ModuleDict({str(i): Layer(cfg, i, dtype, experts) for i in layers})
        if layers.stop == cfg.num_hidden_layers:
            self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, dtype)


class Chunk(nn.Module):
    """Consecutive layers, with the embedding if they are the first, norm and head if the last.

    Hugging Face names of parameters do not depend on how a model is cut into chunks, or its
    experts over ranks.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layers: range,
        dtype: torch.dtype,
        experts: range | None = None,
    ) -> None:
        """A chunk.

        Args:
            cfg: the whole model.
            layers: the chunk's, by their index in the model.
            dtype: of parameters.
            experts: which of every layer's routed experts this rank holds; None: all.
        """
        super().__init__()
        self.config = cfg
        self.experts = range(cfg.n_routed_experts) if experts is None else experts
        self.model = Backbone(cfg, layers, dtype, self.experts)
        if layers.stop == cfg.num_hidden_layers:
            self.lm_head = Head(cfg.hidden_size, cfg.vocab_size, dtype)

    def run(self, x: Tensor, microbatch: Microbatch, dispatcher: Dispatcher) -> Tensor:
        """Tokens [batch, length] in the first chunk, hidden states after it, to hidden states.

        The last chunk's final norm is included.
        """
        backbone = self.model
        if hasattr(backbone, "embed_tokens"):
            x = backbone.embed_tokens(x)
        for layer in backbone.layers.values():
            x = layer(x, microbatch, dispatcher)
        if hasattr(backbone, "norm"):
            x = backbone.norm(x)
        return x

    def hf_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, view of the parameter), experts unstacked; this rank's only."""
        for name, parameter in self.named_parameters():
            yield from hf_views(name, parameter.detach(), self.experts.start)

    def hf_named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, view of the gradient), experts unstacked.

        The gradient is ``main_grad`` where a parameter has one, else ``grad``; parameters
        without either are left out.
        """
        for name, parameter in self.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is None:
                gradient = parameter.grad
            if gradient is not None:
                yield from hf_views(name, gradient, self.experts.start)

    def hf_named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, buffer): the routers' selection biases."""
        yield from self.named_buffers()

    def update_router_bias(self, record: StepRecord, rate: float) -> None:
        """Move every router's bias against its load; once a step, after the optimizer."""
        for layer in self.model.layers.values():
            if isinstance(layer, Layer) and layer.router is not None:
                counts = record.expert_counts[layer.moe_index]
                update_bias(layer.router.e_score_correction_bias, counts, rate)
