"""Floating-point operations of a training step, counted analytically.

FLOP counters that hook operators see a grouped matmul as zero, so nothing is measured
here: six operations a matmul parameter and token (forward, dX, dW), and causal
attention at half of the full score matrix.
"""

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.plan.parameters import count_parameters


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
