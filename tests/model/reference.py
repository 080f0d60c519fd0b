"""An independent DeepSeek-V3 in a few lines of plain torch, float64, one matrix a name.

Written from the papers' equations (arXiv 2405.04434, 2412.19437), with loops over experts
and full logits: slow, obvious, and sharing nothing with the package but the configuration.
"""

import math

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig

Weights = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rope(x: Tensor, theta: float) -> Tensor:
    """Turn adjacent pairs of x [batch, length, heads, d]."""
    length, d = x.shape[1], x.shape[-1]
    angle = torch.outer(
        torch.arange(length, dtype=x.dtype), theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    )[:, None, :]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1
    ).flatten(-2)


def attention(
    w: Weights, p: str, x: Tensor, cfg: ModelConfig, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and the maximum logit of each head over visible pairs."""
    B, S, _ = x.shape
    H, n, r, v = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
    )
    if cfg.q_lora_rank is None:
        q = x @ w[f"{p}.q_proj.weight"].T
    else:
        latent = norm(x @ w[f"{p}.q_a_proj.weight"].T, w[f"{p}.q_a_layernorm.weight"], 1e-6)
        q = latent @ w[f"{p}.q_b_proj.weight"].T
    q_nope, q_rope = q.view(B, S, H, n + r).split([n, r], dim=-1)
    latent, k_rope = (x @ w[f"{p}.kv_a_proj_with_mqa.weight"].T).split([cfg.kv_lora_rank, r], -1)
    latent = norm(latent, w[f"{p}.kv_a_layernorm.weight"], 1e-6)
    k_nope, value = (latent @ w[f"{p}.kv_b_proj.weight"].T).view(B, S, H, n + v).split([n, v], -1)
    k_rope = rope(k_rope[:, :, None], cfg.rope_theta)[:, :, 0]
    logits = torch.einsum("bqhd,bkhd->bhqk", q_nope, k_nope)
    logits = logits + torch.einsum("bqhd,bkd->bhqk", rope(q_rope, cfg.rope_theta), k_rope)
    logits = logits / math.sqrt(n + r)
    visible = torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    logits = logits.masked_fill(~visible, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value).reshape(B, S, H * v)
    return out @ w[f"{p}.o_proj.weight"].T, logits.detach().amax(dim=(0, 2, 3))


def mlp(w: Weights, p: str, x: Tensor) -> Tensor:
    gate, up = x @ w[f"{p}.gate_proj.weight"].T, x @ w[f"{p}.up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ w[f"{p}.down_proj.weight"].T


def experts_of(score: Tensor, bias: Tensor, cfg: ModelConfig) -> list[int]:
    """The chosen experts of one token, by sorting."""
    worth = (score + bias).tolist()
    size = cfg.n_routed_experts // cfg.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(cfg.n_group)]
    if cfg.n_group > 1:
        groups.sort(key=lambda group: -sum(sorted((worth[e] for e in group), reverse=True)[:2]))
        groups = groups[: cfg.topk_group]
    candidates = [e for group in groups for e in group]
    return sorted(candidates, key=lambda e: -worth[e])[: cfg.num_experts_per_tok]


def moe(w: Weights, p: str, x: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """Output and the auxiliary loss (equations 17 to 20, mean over sequences)."""
    B, S, hidden = x.shape
    scores = (x @ w[f"{p}.gate.weight"].T).sigmoid()
    load = torch.zeros(B, cfg.n_routed_experts, dtype=x.dtype)
    rows = []
    for b in range(B):
        for t in range(S):
            chosen = experts_of(
                scores[b, t].detach(), w[f"{p}.gate.e_score_correction_bias"].to(x.dtype), cfg
            )
            load[b, chosen] += 1
            weights = scores[b, t, chosen]
            if cfg.norm_topk_prob:
                weights = weights / (weights.sum() + 1e-20)
            outputs = torch.stack([mlp(w, f"{p}.experts.{e}", x[b, t]) for e in chosen])
            rows.append(cfg.routed_scaling_factor * (weights @ outputs))
    share = (scores / scores.sum(-1, keepdim=True)).mean(dim=1)  # P, [B, experts]
    frequency = load * cfg.n_routed_experts / (cfg.num_experts_per_tok * S)  # f
    aux = cfg.aux_loss_alpha * (frequency * share).sum(-1).mean()
    return torch.stack(rows).view(B, S, hidden) + mlp(w, f"{p}.shared_experts", x), aux


def forward(
    w: Weights, tokens: Tensor, cfg: ModelConfig, documents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, S, V], the sum of auxiliary losses, the maximum logits [layers, heads]."""
    x = w["model.embed_tokens.weight"][tokens]
    aux = torch.zeros((), dtype=x.dtype)
    maxima = []
    for i in range(cfg.num_hidden_layers):
        p = f"model.layers.{i}"
        attended, maximum = attention(
            w,
            f"{p}.self_attn",
            norm(x, w[f"{p}.input_layernorm.weight"], cfg.rms_norm_eps),
            cfg,
            documents,
        )
        maxima.append(maximum)
        x = x + attended
        h = norm(x, w[f"{p}.post_attention_layernorm.weight"], cfg.rms_norm_eps)
        if i < cfg.first_k_dense_replace:
            x = x + mlp(w, f"{p}.mlp", h)
        else:
            out, layer_aux = moe(w, f"{p}.mlp", h, cfg)
            x, aux = x + out, aux + layer_aux
    x = norm(x, w["model.norm.weight"], cfg.rms_norm_eps)
    return x @ w["lm_head.weight"].T, aux, torch.stack(maxima)
