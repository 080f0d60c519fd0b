"""One transformer layer as four phases: attend, dispatch, expert, combine.

Each phase is a function of the former's result and holds no state, so that a schedule can
run each between detached tensors, and let the communication of one microbatch fly while
another computes (design 4.3). Run straight through they are the plain forward: there is no
second implementation.
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
from kimi_pretrain.parallel.dispatch import Arrived, Dispatcher, DispatchPlan, Route, plan_dispatch


@dataclass(frozen=True)
class Routed:
    """The routed part of a MoE layer's microbatch, as the dispatcher sends it."""

    rows: Tensor  # [tokens * k, hidden] in expert order
    weights: Tensor  # [tokens, k], factors of the experts' outputs
    plan: DispatchPlan


@dataclass(frozen=True)
class Attended:
    """Result of ``attend``."""

    residual: Tensor  # [batch, length, hidden], after attention
    hidden: Tensor  # [batch, length, hidden], normalised input of the MLP
    routed: Routed | None  # None in a dense layer


@dataclass(frozen=True)
class Dispatched:
    """Result of ``dispatch``: the rows are where their experts are."""

    attended: Attended
    arrived: Arrived | None


@dataclass(frozen=True)
class Processed:
    """Result of ``expert``."""

    residual: Tensor  # [batch, length, hidden], dense or shared MLP added
    rows: Tensor | None  # [rows, hidden] the experts' outputs, where the experts are
    routed: Routed | None
    route: Route | None  # how they came there


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
        dispatched = self.dispatch(attended, dispatcher)
        processed = self.expert(dispatched)
        return self.combine(processed, dispatcher)

    def attend(self, x: Tensor, microbatch: Microbatch, dispatcher: Dispatcher) -> Attended:
        """Attention, residual, the MLP's norm; in a MoE layer also routing and permutation."""
        residual = x + self.self_attn(self.input_layernorm(x), microbatch)
        hidden = self.post_attention_layernorm(residual)
        if isinstance(self.mlp, DenseMLP):
            return Attended(residual, hidden, None)
        record = microbatch.record
        routing = self.mlp.gate(hidden, None if record is None else record.aux_scale)
        plan = plan_dispatch(routing.indices, self.cfg.n_routed_experts)
        if record is not None:
            record.observe_routing(self.moe_index, plan.counts, routing.aux_loss)
        rows = dispatcher.permute(hidden.flatten(0, 1), plan)
        return Attended(residual, hidden, Routed(rows, routing.weights, plan))

    def dispatch(self, attended: Attended, dispatcher: Dispatcher) -> Dispatched:
        """Rows to their experts (all-to-all)."""
        routed = attended.routed
        if routed is None:
            return Dispatched(attended, None)
        return Dispatched(attended, dispatcher.dispatch(routed.rows, routed.weights, routed.plan))

    def expert(self, dispatched: Dispatched) -> Processed:
        """Routed experts on what arrived; the dense or shared MLP on this rank's tokens."""
        attended = dispatched.attended
        if isinstance(self.mlp, DenseMLP):
            return Processed(attended.residual + self.mlp(attended.hidden), None, None, None)
        arrived = dispatched.arrived
        assert arrived is not None
        rows = self.mlp.experts(arrived)
        shared = self.mlp.shared_experts(attended.hidden)
        return Processed(attended.residual + shared, rows, attended.routed, arrived.route)

    def combine(self, processed: Processed, dispatcher: Dispatcher) -> Tensor:
        """Rows back to their tokens (all-to-all), weighted sum, residual."""
        routed = processed.routed
        if routed is None:
            return processed.residual
        assert processed.rows is not None
        rows = dispatcher.combine(processed.rows, processed.route)
        total = dispatcher.unpermute(rows, routed.weights, routed.plan)
        return processed.residual + total.view_as(processed.residual)
