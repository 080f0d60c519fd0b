"""One transformer layer as four phases: attend, dispatch, expert, combine.

``attend``, ``expert`` and ``combine`` compute; between them rows travel to their experts and
back (the dispatcher's all-to-all, before ``expert`` and before ``combine``). Each is a function
of tensors and holds no state, so that a schedule runs each between detached tensors
(``model.tape``) and lets the communication of one microbatch fly while another computes
(design 4.3). Run straight through they are the plain forward: there is no second
implementation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.attention import MLA
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.mlp import DenseMLP, MoE
from kimi_pretrain.model.norm import RMSNorm
from kimi_pretrain.model.router import Router
from kimi_pretrain.ops.saved import named
from kimi_pretrain.parallel.dispatch import (
    Arrived,
    Dispatcher,
    DispatchPlan,
    dispatched,
    plan_dispatch,
    sent_back,
)


@dataclass(frozen=True)
class Routed:
    """What a MoE layer sends to its experts, and what it needs when it comes back."""

    rows: Tensor  # [tokens * k, hidden] in expert order (or as the dispatcher wants them)
    sent_weights: Tensor | None  # router weights that travel with the rows
    weights: Tensor  # [tokens, k], factors of the experts' outputs
    plan: DispatchPlan


@dataclass(frozen=True)
class Attended:
    """Result of ``attend``."""

    residual: Tensor  # [batch, length, hidden], after attention
    hidden: Tensor  # [batch, length, hidden], normalised input of the MLP
    routed: Routed | None  # None in a dense layer


class Layer(nn.Module):
    """``model.layers.<index>``; dense below ``first_k_dense_replace``, else MoE."""

    def __init__(self, cfg: ModelConfig, index: int, dtype: torch.dtype, experts: range) -> None:
        """Layer ``index`` with these of its routed experts."""
        super().__init__()
        self.cfg, self.index = cfg, index
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, dtype)
        self.self_attn = MLA(cfg, index, dtype)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, dtype)
        self.mlp: DenseMLP | MoE
        if index < cfg.first_k_dense_replace:
            self.mlp = DenseMLP(cfg.hidden_size, cfg.intermediate_size, dtype)
        else:
            self.mlp = MoE(cfg, dtype, experts)

    @property
    def moe_index(self) -> int:
        """Row of this layer in a record's arrays of MoE layers."""
        return self.index - self.cfg.first_k_dense_replace

    @property
    def router(self) -> Router | None:
        """The router; None in a dense layer."""
        return self.mlp.gate if isinstance(self.mlp, MoE) else None

    def forward(self, x: Tensor, microbatch: Microbatch, dispatcher: Dispatcher) -> Tensor:
        """The four phases straight through: [batch, length, hidden] to the same shape."""
        attended = self.attend(x, microbatch, dispatcher)
        routed = attended.routed
        if routed is None:
            return self.dense(attended.residual, attended.hidden)
        arrived = dispatched(dispatcher, routed.rows, routed.sent_weights, routed.plan)
        residual, rows = self.expert(attended.residual, attended.hidden, arrived)
        rows = sent_back(dispatcher, rows, arrived.route)
        return self.combine(residual, rows, routed.weights, routed.plan, dispatcher)

    def attend(self, x: Tensor, microbatch: Microbatch, dispatcher: Dispatcher) -> Attended:
        """Attention, residual, the MLP's norm; in a MoE layer also routing and permutation."""
        residual = x + self.self_attn(self.input_layernorm(x), microbatch)
        hidden = self.post_attention_layernorm(residual)
        if isinstance(self.mlp, DenseMLP):
            return Attended(residual, hidden, None)
        record = microbatch.record
        routing = self.mlp.gate(hidden, None if record is None else record.aux_scale)
        plan = plan_dispatch(routing.indices, self.cfg.n_routed_experts)
        named("route", plan.order, plan.inverse)
        if record is not None:
            record.observe_routing(self.moe_index, plan.counts, routing.aux_loss)
        rows, sent = dispatcher.permute(hidden.flatten(0, 1), routing.weights, plan)
        return Attended(residual, hidden, Routed(rows, sent, routing.weights, plan))

    def dense(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """The rest of a dense layer."""
        inner: Tensor = self.mlp(hidden)
        return residual + inner

    def expert(self, residual: Tensor, hidden: Tensor, arrived: Arrived) -> tuple[Tensor, Tensor]:
        """Routed experts on what arrived, and the shared expert on this rank's tokens.

        Returns:
            The residual with the shared expert's output added, and the experts' outputs
            [rows, hidden], where the experts are.
        """
        assert isinstance(self.mlp, MoE)
        rows = self.mlp.experts(arrived)
        return residual + self.mlp.shared_experts(hidden), rows

    def combine(
        self,
        residual: Tensor,
        rows: Tensor,
        weights: Tensor,
        plan: DispatchPlan,
        dispatcher: Dispatcher,
    ) -> Tensor:
        """The weighted sum of each token's rows, which are back, and the residual."""
        if not dispatcher.weights_at_experts:
            named("expert_out", rows)
            named("router", weights)
        total = dispatcher.unpermute(rows, weights, plan)
        return residual + total.view_as(residual)
