"""Floating-point operations of a training step, counted analytically.

FLOP counters that hook operators see a grouped matmul as zero, so nothing is measured
here: six operations a matmul parameter and token (forward, dX, dW), and causal
attention at half of the full score matrix.
"""

from dataclasses import dataclass

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.plan.parameters import attention_parameters, count_parameters
from kimi_pretrain.plan.totals import ModelTotals

# Of ops/linear_cross_entropy.py, which imports torch; a test holds them against each other.
HEAD_TILE_ELEMENTS = 2**22
HEAD_MIN_TOKENS = 256


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs that one token costs in forward and backward, without any recomputation.

    Matrices count, norms and the input embedding do not; K2 at 4,096 tokens gives 205.47e9.
    """
    count = count_parameters(model)
    linear = 6 * (count.active_with_head - count.norms)
    qk_and_v = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    # scores and values: 2 FLOPs a multiply-add, S/2 keys on average, 3 x for forward and backward
    attention = 3 * model.num_hidden_layers * model.num_attention_heads * qk_and_v * sequence_length
    return linear + attention


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one token's forward through one layer, by what limits their speed."""

    projections: int  # of attention, and the router
    attention: int  # scores and values, causal
    dense: int  # dense MLP or shared expert
    routed: int  # the experts that the token chose

    @property
    def matrices(self) -> int:
        """All but attention: what the input's and the weights' gradients cost again each."""
        return self.projections + self.dense + self.routed


def layer_flops(model: ModelConfig, moe: bool, sequence_length: int) -> LayerFlops:
    """Forward FLOPs of a token in a MoE or a dense layer; it sees half a sequence on average."""
    norms = model.kv_lora_rank + (model.q_lora_rank or 0)
    projections = 2 * (attention_parameters(model) - norms)
    qk_and_v = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    attention = model.num_attention_heads * qk_and_v * sequence_length
    if not moe:
        dense = 6 * model.hidden_size * model.intermediate_size
        return LayerFlops(projections, attention, dense, 0)
    expert = 6 * model.hidden_size * model.moe_intermediate_size
    router = 2 * model.hidden_size * model.n_routed_experts
    return LayerFlops(
        projections + router,
        attention,
        model.n_shared_experts * expert,
        model.num_experts_per_tok * expert,
    )


def head_flops(model: ModelConfig) -> int:
    """FLOPs of one product of a token's hidden state with the output head."""
    return 2 * model.hidden_size * model.vocab_size


def head_is_cut(model: ModelConfig, tokens: int) -> bool:
    """Whether the loss takes the vocabulary in parts: one that does not fit a tile with some
    hundreds of tokens (``ops/linear_cross_entropy.py``, whose constants a test compares)."""
    return model.vocab_size * min(tokens, HEAD_MIN_TOKENS) > HEAD_TILE_ELEMENTS


def head_products(model: ModelConfig, tokens: int) -> tuple[int, int]:
    """How often forward and backward multiply by the head: logits, both gradients.

    Forward does all of it, unless the vocabulary is cut: then backward computes the logits again.
    """
    return (1, 3) if head_is_cut(model, tokens) else (3, 0)


def up_projection_flops(model: ModelConfig) -> int:
    """FLOPs a token and layer of the projections that make queries, keys and values.

    What recomputing ``mla_up`` adds: q_b and kv_b, or the full q_proj.
    """
    heads = model.num_attention_heads
    q = model.qk_nope_head_dim + model.qk_rope_head_dim
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    up += (model.q_lora_rank or model.hidden_size) * heads * q
    return 2 * up


def recomputed_flops(model: ModelConfig, moe: bool) -> int:
    """FLOPs a token and layer that K2's published recomputation adds; K2's 61 layers: 19.18e9.

    The up-projections of attention, and in a MoE layer the down-projections. Ours are not
    computed again (docs/activations.md): with router weights before them nothing of their output
    is needed.
    """
    experts = model.num_experts_per_tok + model.n_shared_experts
    down = experts * model.moe_intermediate_size * model.hidden_size
    return up_projection_flops(model) + 2 * down * moe


def newton_schulz_flops_per_step(model: ModelConfig) -> int:
    """FLOPs of orthogonalising every Muon matrix of the model once."""
    return ModelTotals(model, ep=1).stage(range(model.num_hidden_layers)).newton_schulz


def inference_flops_per_token(model: ModelConfig, context: int, heads: int | None = None) -> int:
    """FLOPs of generating a token after ``context`` tokens: all active parameters, and attention.

    Args:
        model: whose parameters count, both embeddings included.
        context: keys that the token sees.
        heads: of attention, its projections held as they are; None: the model's. K2's report
            compares 128 with 64 (arXiv 2507.20534, section 2.3).
    """
    qk_and_v = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    count = heads or model.num_attention_heads
    attention = 2 * model.num_hidden_layers * count * qk_and_v * context
    return 2 * count_parameters(model).active_with_both + attention
