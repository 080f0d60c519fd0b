"""Small configurations; every width differs from every other, so that a mix-up cannot pass."""

from collections.abc import Callable
from typing import Any

import pytest

from kimi_pretrain.config.schema import ModelConfig


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "vocab_size": 61,
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "q_lora_rank": 20,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 8,
        "max_position_embeddings": 64,
        "intermediate_size": 34,
        "moe_intermediate_size": 18,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "aux_loss_alpha": 0.5,
    }
    return ModelConfig(**(values | changes))


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    return tiny_config
