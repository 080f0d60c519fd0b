"""What one optimizer step observes in the forwards of its microbatches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.ops import attention


@dataclass
class StepRecord:
    """Observations of one step, created by the step and passed to its forwards.

    The layers' phases write into it under ``no_grad``, in the phase's own body. What an
    activation policy recomputes in backward are single operations inside a phase, never a
    phase, so nothing here is counted twice. Maxima are taken, counts and losses are summed
    over microbatches; ranks combine records in the same way.
    """

    max_logits: Tensor  # [layers, heads] signed, -inf until observed
    exact: Tensor  # [layers, heads] bool: max_logits is a maximum, not its bound
    expert_counts: Tensor  # [MoE layers, experts] int64
    aux_loss: Tensor  # [MoE layers] sum over microbatches, alpha included
    tokens: int
    tau: float | None  # exact maxima for heads whose bound exceeds it; None: for none
    all_exact: bool  # exact maxima for all heads
    aux_scale: float  # factor of the auxiliary loss's gradient: 1 / microbatches of the step

    @classmethod
    def for_model(
        cls,
        cfg: ModelConfig,
        tau: float | None,
        exact: bool = False,
        aux_scale: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "StepRecord":
        """An empty record.

        Args:
            cfg: the model.
            tau: QK-Clip's threshold; heads whose log-sum-exp exceeds it get the exact pass.
            exact: every head gets the exact pass, as evaluation wants it.
            aux_scale: factor of the auxiliary loss's gradient; one over the number of
                microbatches in the global batch makes it their mean.
            device: of the tensors.
            dtype: of the maxima and losses.
        """
        heads = (cfg.num_hidden_layers, cfg.num_attention_heads)
        moe_layers = max(0, cfg.num_hidden_layers - cfg.first_k_dense_replace)
        return cls(
            max_logits=torch.full(heads, -torch.inf, dtype=dtype, device=device),
            exact=torch.zeros(heads, dtype=torch.bool, device=device),
            expert_counts=torch.zeros(
                moe_layers, cfg.n_routed_experts, dtype=torch.int64, device=device
            ),
            aux_loss=torch.zeros(moe_layers, dtype=dtype, device=device),
            tokens=0,
            tau=tau,
            all_exact=exact,
            aux_scale=aux_scale,
        )

    @torch.no_grad()
    def observe_attention(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        scale: float,
        document_ids: Tensor | None,
        exactly: Callable[..., Tensor] = attention.max_logits,
    ) -> None:
        """Fold one microbatch's logits of a layer into the maxima (QK-Clip, arXiv 2507.20534).

        The log-sum-exp of a row is at least its maximum, so a head whose largest
        log-sum-exp is within tau needs no clip; only the others are computed exactly.

        Args:
            layer: index in the model.
            q: as for ``ops.attention.max_logits``.
            k: as for ``ops.attention.max_logits``.
            lse: [batch, heads, length], from ``ops.attention.attention``.
            scale: factor of the logits.
            document_ids: as for ``ops.attention.max_logits``.
            exactly: ``ops.attention.max_logits``, or a kernel that stands for it.
        """
        bound = lse.amax(dim=(0, 2)).to(self.max_logits.dtype)  # [heads]
        if self.all_exact:
            exact = torch.ones_like(self.exact[layer])
        elif self.tau is None:
            exact = torch.zeros_like(self.exact[layer])
        else:
            exact = bound > self.tau
        if self.all_exact or self.tau is not None:
            maxima = exactly(q, k, scale, document_ids, exact).to(bound.dtype)
            bound = torch.where(exact, maxima, bound)
        # A maximum is exact if the larger value is: it dominates the other's bound.
        larger = bound > self.max_logits[layer]
        self.exact[layer] = torch.where(larger, exact, self.exact[layer])
        self.max_logits[layer] = torch.maximum(bound, self.max_logits[layer])

    @torch.no_grad()
    def observe_routing(self, moe_layer: int, counts: Tensor, aux_loss: Tensor | None) -> None:
        """Add one microbatch's slots per expert [experts] and its auxiliary loss."""
        self.expert_counts[moe_layer] += counts
        if aux_loss is not None:
            self.aux_loss[moe_layer] += aux_loss
