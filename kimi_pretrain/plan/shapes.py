"""The parameters of a pipeline stage as one rank holds them: names, shapes and order, no torch.

This repeats what ``model`` builds, because a plan does not import torch; a test holds the two
against each other.
"""

from collections.abc import Iterator

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.optim.who import uses_muon

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_EXPERTS = ".mlp.experts."


def stage_specs(model: ModelConfig, layers: range, ep: int = 1) -> list[Spec]:
    """What ``Chunk.named_parameters()`` gives on a rank of this stage, in its order.

    Args:
        model: the whole model.
        layers: the stage's; the first layer brings the embedding, the last norm and head.
        ep: ranks that share the routed experts; it divides their number.
    """
    return [
        Spec(name, shape, muon=uses_muon(name, len(shape)), expert=_EXPERTS in name)
        for name, shape in _stage(model, layers, ep)
    ]


def _stage(model: ModelConfig, layers: range, ep: int) -> Shapes:
    vocabulary = (model.vocab_size, model.hidden_size)
    if layers.start == 0:
        yield "model.embed_tokens.weight", vocabulary
    for index in layers:
        for name, shape in _layer(model, index, ep):
            yield f"model.layers.{index}.{name}", shape
    if layers.stop == model.num_hidden_layers:
        yield "model.norm.weight", (model.hidden_size,)
        yield "lm_head.weight", vocabulary


def _layer(model: ModelConfig, index: int, ep: int) -> Shapes:
    hidden, width = model.hidden_size, model.moe_intermediate_size
    yield "input_layernorm.weight", (hidden,)
    yield from _attention(model)
    yield "post_attention_layernorm.weight", (hidden,)
    if index < model.first_k_dense_replace:
        yield from _mlp("mlp", hidden, model.intermediate_size)
        return
    experts = model.n_routed_experts // ep
    yield "mlp.gate.weight", (model.n_routed_experts, hidden)
    yield "mlp.experts.gate_up_proj", (experts, 2, width, hidden)
    yield "mlp.experts.down_proj", (experts, hidden, width)
    yield from _mlp("mlp.shared_experts", hidden, width * model.n_shared_experts)


def _attention(model: ModelConfig) -> Shapes:
    hidden, heads, latent = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    if model.q_lora_rank is None:
        yield "self_attn.q_proj.weight", (query, hidden)
    else:
        yield "self_attn.q_a_proj.weight", (model.q_lora_rank, hidden)
        yield "self_attn.q_a_layernorm.weight", (model.q_lora_rank,)
        yield "self_attn.q_b_proj.weight", (query, model.q_lora_rank)
    key_value = heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + model.qk_rope_head_dim, hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (key_value, latent)
    yield "self_attn.o_proj.weight", (hidden, heads * model.v_head_dim)


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}.gate_up_proj", (2, width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)
