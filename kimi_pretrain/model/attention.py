"""Multi-head latent attention (arXiv 2405.04434, section 2.1)."""

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.hand_out import CallsKernels
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.norm import RMSNorm
from kimi_pretrain.model.projection import Projection
from kimi_pretrain.ops.mla_heads import mla_heads
from kimi_pretrain.ops.saved import remade

# The norms inside q_a and kv_a have this epsilon whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MLA(CallsKernels):
    """``self_attn`` of a layer: low-rank queries (or full ones), low-rank keys and values."""

    def __init__(self, cfg: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        heads = cfg.num_attention_heads
        q_width = heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        if cfg.q_lora_rank is None:
            self.q_proj = Projection(cfg.hidden_size, q_width, dtype)
        else:
            self.q_a_proj = Projection(cfg.hidden_size, cfg.q_lora_rank, dtype)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, LATENT_NORM_EPS, dtype)
            self.q_b_proj = Projection(cfg.q_lora_rank, q_width, dtype)
        self.kv_a_proj_with_mqa = Projection(
            cfg.hidden_size, cfg.kv_lora_rank + cfg.qk_rope_head_dim, dtype
        )
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, LATENT_NORM_EPS, dtype)
        self.kv_b_proj = Projection(
            cfg.kv_lora_rank, heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), dtype
        )
        self.o_proj = Projection(heads * cfg.v_head_dim, cfg.hidden_size, dtype)

    def forward(self, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """[batch, length, hidden] to the same shape; maxima go into the microbatch's record."""
        cfg = self.cfg
        batch, length, _ = hidden.shape
        by_head = (batch, length, cfg.num_attention_heads, -1)
        if cfg.q_lora_rank is None:
            q_in, q_up = hidden, self.q_proj
        else:
            q_in, q_up = self.q_a_layernorm(self.q_a_proj(hidden)), self.q_b_proj
        latent, k_rope = self.kv_a_proj_with_mqa(hidden).split(
            [cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1
        )
        kv_in = self.kv_a_layernorm(latent)

        def up(q_in: Tensor, kv_in: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, kv = q_up(q_in).view(by_head), self.kv_b_proj(kv_in).view(by_head)
            return mla_heads(q, kv, k_rope, microbatch.cos, microbatch.sin)

        queries, keys, values = remade("mla_up", up, q_in, kv_in, k_rope)
        scale, document_ids = microbatch.softmax_scale, microbatch.document_ids
        out, lse = self.kernels.attention(queries, keys, values, scale, document_ids)
        if microbatch.record is not None:
            exactly = self.kernels.max_logits
            logits = (queries, keys, lse, scale, document_ids)
            microbatch.record.observe_attention(self.layer, *logits, exactly)
        result: Tensor = self.o_proj(out.flatten(2))
        return result
