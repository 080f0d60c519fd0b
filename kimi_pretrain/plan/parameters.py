"""Parameter counts of a model, from its configuration alone.

Every way of counting that circulates for this family is named, because the numbers
people quote differ: K2's "32.6B active" lies between the counts with one and with both
embeddings, its "1.04T" counts a layer that the released weights do not hold.
"""

from dataclasses import dataclass

from kimi_pretrain.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters (elements) of one model; router bias buffers are counted apart."""

    total: int
    active_without_embedding: int  # per token: attention, router, active experts, norms
    norms: int  # of these: vectors, which multiply no matrix
    embedding: int
    head: int
    router_bias: int

    @property
    def active_with_head(self) -> int:
        return self.active_without_embedding + self.head

    @property
    def active_with_both(self) -> int:
        return self.active_with_head + self.embedding


def attention_parameters(model: ModelConfig) -> int:
    """Elements of one MLA block, its two inner norms included."""
    heads = model.num_attention_heads
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    if model.q_lora_rank is None:
        q = model.hidden_size * query
    else:
        q = model.hidden_size * model.q_lora_rank + model.q_lora_rank * (query + 1)
    kv_a = model.hidden_size * (model.kv_lora_rank + model.qk_rope_head_dim)
    kv_b = model.kv_lora_rank * (heads * (model.qk_nope_head_dim + model.v_head_dim) + 1)
    o = heads * model.v_head_dim * model.hidden_size
    return q + kv_a + kv_b + o


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Total and active parameters of `model`, for every way of counting in use."""
    hidden = model.hidden_size
    dense_layers = min(model.first_k_dense_replace, model.num_hidden_layers)
    moe_layers = model.num_hidden_layers - dense_layers
    every_layer = attention_parameters(model) + 2 * hidden  # and its two norms
    norms = model.num_hidden_layers * (2 * hidden + model.kv_lora_rank + (model.q_lora_rank or 0))
    expert = 3 * hidden * model.moe_intermediate_size
    router = model.n_routed_experts * hidden
    outside_routed = (
        model.num_hidden_layers * every_layer
        + dense_layers * 3 * hidden * model.intermediate_size
        + moe_layers * (router + model.n_shared_experts * expert)
        + hidden  # the final norm
    )
    embedding = head = model.vocab_size * hidden
    return ParameterCount(
        total=outside_routed + moe_layers * model.n_routed_experts * expert + embedding + head,
        active_without_embedding=outside_routed + moe_layers * model.num_experts_per_tok * expert,
        norms=norms + hidden,
        embedding=embedding,
        head=head,
        router_bias=moe_layers * model.n_routed_experts,
    )
