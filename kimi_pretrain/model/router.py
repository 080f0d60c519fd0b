"""The router: which experts a token goes to, with which weight, and how load is balanced.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores; a bias that only chooses;
weights that are the unbiased scores, normalised and scaled; a sequence-wise auxiliary loss
against extreme imbalance within one sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.ops.linear import linear
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.ops.saved import named, remade


@dataclass(frozen=True)
class Routing:
    """The router's choice for a microbatch."""

    indices: Tensor  # [tokens, k] int64, experts
    weights: Tensor  # [tokens, k] fp32 (fp64 for fp64), factors of the experts' outputs
    counts: Tensor  # [batch, experts] int64, slots of each expert in each sequence
    aux_loss: Tensor | None  # scalar without gradient; None where it is not wanted


# scores [tokens, experts] and bias [experts] to indices [tokens, k], as ``choose_experts``
Choose = Callable[[Tensor, Tensor, ModelConfig], Tensor]


class Router(nn.Module):
    """``mlp.gate`` of a layer; computes in fp32 (fp64 in an fp64 model).

    ``choose`` may be replaced: a run without values (``dry_run``) cannot tell the largest score.
    """

    e_score_correction_bias: Tensor

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.cfg = cfg
        self.choose: Choose = choose_experts
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size, dtype=dtype))
        # A bf16 bias could not move by 0.001 once it has grown: 0.5 + 0.001 rounds to 0.5.
        bias = torch.zeros(cfg.n_routed_experts, dtype=accumulate_dtype(dtype))
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden: Tensor, aux_scale: float | None = None) -> Routing:
        """Route ``hidden`` [batch, length, hidden].

        Args:
            hidden: the normalised residual stream.
            aux_scale: factor of the auxiliary loss's gradient, which is added where scores
                receive theirs; None leaves the loss out.
        """
        cfg = self.cfg
        batch = hidden.shape[0]
        high = accumulate_dtype(hidden.dtype)
        logits = linear(remade("router_in", lambda x: x.to(high), hidden), self.weight)
        scores = logits.sigmoid()  # [batch, length, experts]
        named("router", scores)
        with torch.no_grad():
            flat = scores.view(-1, cfg.n_routed_experts)  # [tokens, experts]
            indices = self.choose(flat, self.e_score_correction_bias, cfg)
            counts = _counts_per_sequence(indices, batch, cfg.n_routed_experts)
        aux_loss = None
        if aux_scale is not None and cfg.aux_loss_alpha > 0.0:
            load = sequence_load(counts, hidden.shape[1], cfg)
            with torch.no_grad():
                aux_loss = balance_loss(scores, load)
            if aux_scale != 0.0:
                load = load * aux_scale
                named("router", load)
                scores = _BalanceGradient.apply(scores, load)  # type: ignore[no-untyped-call]
        named("route", indices)
        weights = scores.view(-1, cfg.n_routed_experts).gather(1, indices)  # [tokens, k]
        if cfg.norm_topk_prob:
            total = weights.sum(dim=-1, keepdim=True) + 1e-20
            named("router", weights, total)
            weights = weights / total
        return Routing(indices, weights * cfg.routed_scaling_factor, counts, aux_loss)


def choose_experts(scores: Tensor, bias: Tensor, cfg: ModelConfig) -> Tensor:
    """The k experts of every token: [tokens, experts] scores to [tokens, k] indices.

    The bias takes part in the choice only. With groups, a token's experts come from its
    ``topk_group`` best groups, a group's worth being the sum of its two best biased scores
    (arXiv 2412.19437, section 2.1.2).
    """
    choice = scores + bias
    if cfg.n_group > 1:
        tokens, experts = choice.shape
        groups = choice.view(tokens, cfg.n_group, experts // cfg.n_group)
        worth = groups.topk(2, dim=-1).values.sum(dim=-1)  # [tokens, groups]
        best = worth.topk(cfg.topk_group, dim=-1, sorted=False).indices
        masked = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        # Not 0: an expert of a masked group would win against a negative biased score.
        choice = groups.masked_fill(masked[:, :, None], -torch.inf).view(tokens, experts)
    return _largest(choice, cfg.num_experts_per_tok)


def _largest(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of every row: [rows, columns] to [rows, k], in no order."""
    if k > 4:
        return x.topk(k, dim=-1, sorted=False).indices
    # On CPU topk costs as much as six passes of argmax.
    rest, found = x.clone(), []
    for _ in range(k):
        found.append(rest.argmax(dim=-1, keepdim=True))
        rest.scatter_(1, found[-1], -torch.inf)
    return torch.cat(found, dim=-1)


def sequence_load(counts: Tensor, length: int, cfg: ModelConfig) -> Tensor:
    """``alpha * f_i / batch`` of equation 18, per sequence: [batch, experts] in float64."""
    fair = cfg.num_experts_per_tok * length / cfg.n_routed_experts
    return counts.double() * (cfg.aux_loss_alpha / (fair * counts.shape[0]))


def balance_loss(scores: Tensor, load: Tensor) -> Tensor:
    """``alpha * sum_i f_i P_i``, the mean over sequences (equations 17 to 20).

    Args:
        scores: [batch, length, experts] sigmoid scores.
        load: [batch, experts] from ``sequence_load``.
    """
    share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)  # P, [batch, experts]
    return (share * load.to(share.dtype)).sum()


class _BalanceGradient(torch.autograd.Function):
    """Passes scores through; backward adds the gradient of ``balance_loss``.

    The loss reaches the parameters without being part of the value that is returned, so
    that the reported loss is the cross entropy and every microbatch adds its own share.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, load: Tensor) -> Tensor:
        ctx.save_for_backward(scores, load)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # P_i = mean_t s_ti / sum_j s_tj, hence
        # dL/ds_tj = (load_j - sum_i load_i s_ti / sum s_t) / (length * sum s_t).
        scores, load = ctx.saved_tensors
        load = load.to(scores.dtype)
        total = scores.sum(dim=-1, keepdim=True)  # [batch, length, 1]
        mean_load = (scores @ load.unsqueeze(-1)).div_(total)  # [batch, length, 1]
        grad = (load.unsqueeze(1) - mean_load).div_(total.mul_(scores.shape[1]))
        return grad.add_(grads[0]), None


def _counts_per_sequence(indices: Tensor, batch: int, experts: int) -> Tensor:
    sequence = torch.arange(batch, device=indices.device)[:, None] * experts  # [batch, 1]
    cells = (indices.view(batch, -1) + sequence).view(-1)
    return torch.bincount(cells, minlength=batch * experts).view(batch, experts)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """``b += rate * sign(mean(c) - c)`` in place (arXiv 2408.15664), once a step.

    Args:
        bias: [experts].
        counts: [experts], slots over the global batch.
        rate: u, the step of the bias.
    """
    load = counts.to(torch.float64)
    bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=rate)
