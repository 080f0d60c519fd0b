"""Shapes and names of released models, on the meta device."""

from collections.abc import Iterator

import pytest
import torch

from kimi_pretrain import from_config
from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import ModelConfig


def expected_names(cfg: ModelConfig) -> Iterator[str]:
    """DeepSeek-V3's parameter names as its checkpoints spell them."""
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    queries = ["q_proj"] if cfg.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    for i in range(cfg.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight"
        yield f"{layer}.post_attention_layernorm.weight"
        kv = ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
        yield from (f"{layer}.self_attn.{name}.weight" for name in queries + kv)
        mlps = ["mlp"]
        if i >= cfg.first_k_dense_replace:
            yield f"{layer}.mlp.gate.weight"
            mlps = [f"mlp.experts.{e}" for e in range(cfg.n_routed_experts)]
            mlps.append("mlp.shared_experts")
        for mlp in mlps:
            yield from (f"{layer}.{mlp}.{part}_proj.weight" for part in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("model", "parameters", "biases"),
    [
        ("k2", 1_026_408_209_408, 23_040),
        ("deepseek_v3", 671_026_404_352, 14_848),
        ("moonlight_16b", 15_960_108_544, 1_664),
    ],
)
def test_released_models_have_their_parameters_and_names(
    model: str, parameters: int, biases: int
) -> None:
    """A missing or doubled matrix, or a name that no released checkpoint has."""
    cfg = compose([f"model={model}"]).model
    built = from_config(cfg, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert sum(b.numel() for _, b in built.hf_named_buffers()) == biases
    names = [name for name, _ in built.hf_named_parameters()]
    assert len(names) == len(set(names))
    assert set(names) == set(expected_names(cfg))
    assert sum(view.numel() for _, view in built.hf_named_parameters()) == parameters
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in built.buffers()} == {torch.float32}


def test_the_state_holds_parameters_and_router_biases_only() -> None:
    """Position tables in the state would travel in every checkpoint."""
    cfg = compose(["model=k2_micro"]).model
    model = from_config(cfg)
    buffers = {name for name, _ in model.named_buffers()}
    assert all(name.endswith(".mlp.gate.e_score_correction_bias") for name in buffers)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} | buffers
