"""transformers' DeepseekV3ForCausalLM as the model to compare with.

Eager attention and eager experts are pinned: the other implementations pick kernels by
shape. No network: models are built from configurations.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Widths differ from each other, so that no mix-up keeps the shapes.
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 4096,
    "intermediate_size": 72,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
}


def yarn(**changes: float | str) -> dict[str, Any]:
    """K2's YaRN at a context of 128, so that the ramp lies inside four pairs."""
    return {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    } | changes


def build_peer(
    changes: dict[str, Any], biases: str = "small", dtype: torch.dtype = torch.float32
) -> DeepseekV3ForCausalLM:
    """A model whose weights, norms and router biases are all random and matter.

    Args:
        changes: of BASE.
        biases: of the routers' selection; small, strong (some experts always or never
            chosen) or negative (all far below zero, so that a zero would win).
        dtype: of the model.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(**(BASE | changes))
    model = DeepseekV3ForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:  # activations of order one, router logits of a few
                gain = 4.0 if name.endswith("mlp.gate.weight") else 1.5
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(_biases(biases, len(buffer)))
    return model


def hf_gradients(model: DeepseekV3ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """(name as transformers saves it, gradient): experts are fused in memory, gate first."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        prefix, experts, projection = name.partition(".experts.")
        if not experts:
            yield name, gradient
            continue
        for expert, matrix in enumerate(gradient):
            parts = {"down_proj": matrix}
            if projection == "gate_up_proj":
                gate, up = matrix.chunk(2, dim=0)
                parts = {"gate_proj": gate, "up_proj": up}
            for part, value in parts.items():
                yield f"{prefix}.experts.{expert}.{part}.weight", value


def save(model: DeepseekV3ForCausalLM, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )


class _DoubleTorch:
    """torch, in which float32 means float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in {"float32", "float"} else getattr(torch, name)


def compute_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' explicit float32 (norms, softmax, router, RoPE) be float64."""
    for module in (modeling_deepseek_v3, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", _DoubleTorch())


def _biases(kind: str, experts: int) -> Tensor:
    draw = torch.randn(experts)
    if kind == "small":
        return 0.1 * draw
    if kind == "strong":
        return 3.0 * draw
    assert kind == "negative"
    return -5.0 + 0.3 * draw
