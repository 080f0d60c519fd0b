"""What a layer keeps of a token for its backward, tensor by tensor.

Policy ``none`` is what the operations of ``model`` save today, read off their ``save_for_backward``
and off the leaves that each phase's graph holds; a test counts the tensors of a real layer.
Policy ``k2`` is what K2's report keeps (arXiv 2507.20534, section 2.4.3; design 4.4): outputs of
RMSNorm, of the MLA up-projections and of SwiGLU are computed again, as are the experts' outputs;
inputs of experts and of SwiGLU are FP8 with a scale for 128 values; and all lies in the host's
memory. No run can do that yet.
"""

from dataclasses import dataclass

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import Config, ModelConfig

POLICIES = ("none", "k2")

BF16, FP32, INT64 = 2, 4, 8
FP8 = 1 + FP32 / 128  # E4M3 and its tile's scale

# Softmax weights of attention are kept up to this many (ops/attention.py; a test compares).
ATTENTION_KEPT_ELEMENTS, ATTENTION_MIN_ROWS = 2**23, 64


@dataclass(frozen=True)
class Setting:
    """What of a configuration decides how much is kept."""

    model: ModelConfig
    policy: str
    weights_at_experts: bool  # router weights multiply before the down-projection
    sequence: int  # tokens
    sequences: int  # of a microbatch

    @classmethod
    def of(cls, config: Config, micro_batch_size: int) -> "Setting":
        """The setting of a run.

        Raises:
            ConfigError: an unknown activation policy.
        """
        policy = config.activation.policy
        if policy not in POLICIES:
            fix = f"activation.policy={nearest_name(policy, POLICIES)}"
            rule = f"a plan knows {', '.join(POLICIES)}"
            raise ConfigError("activation.policy", policy, rule, fix)
        return cls(
            config.model,
            policy,
            config.parallel.router_weights == "before_down",
            config.data.sequence_length,
            micro_batch_size,
        )

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.sequence * self.sequences

    @property
    def offloads(self) -> bool:
        """Whether what is kept lies in the host's memory."""
        return self.policy == "k2"


def layer_kept(setting: Setting, moe: bool) -> dict[str, float]:
    """Bytes a token that one layer keeps, by tag, with balanced routing."""
    kept = _attention(setting) | (_experts(setting) if moe else _dense(setting))
    return {tag: size for tag, size in kept.items() if size}


def stage_kept(setting: Setting, layers: range) -> dict[str, float]:
    """Bytes that one microbatch leaves on a stage for its backward, by tag."""
    model, total = setting.model, dict[str, float]()
    dense = sum(layer < model.first_k_dense_replace for layer in layers)
    for moe, count in ((False, dense), (True, len(layers) - dense)):
        if count:
            for tag, size in layer_kept(setting, moe).items():
                total[tag] = total.get(tag, 0.0) + count * size * setting.tokens
    if layers.start == 0:
        total["tokens"] = float(INT64 * setting.tokens)
    if layers.stop == model.num_hidden_layers:
        # The loss computes both gradients in its forward and keeps them.
        hidden = BF16 * model.hidden_size
        total["head"] = float(2 * hidden * setting.tokens + hidden * model.vocab_size)
    return total


def gradients_until_w(setting: Setting, layers: range) -> float:
    """Bytes of one microbatch that a stage's weight gradients wait with, between I and W.

    The gradients of all outputs of matrix products; their inputs are counted as kept.
    """
    model = setting.model
    heads, experts = model.num_attention_heads, model.num_experts_per_tok + model.n_shared_experts
    q = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim) + (model.q_lora_rank or 0)
    kv = model.kv_lora_rank + model.qk_rope_head_dim
    kv += heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = BF16 * (q + kv + model.hidden_size)
    expert = BF16 * experts * (2 * model.moe_intermediate_size + model.hidden_size)
    moe = expert + FP32 * model.n_routed_experts
    dense = BF16 * (2 * model.intermediate_size + model.hidden_size)
    count = sum(layer < model.first_k_dense_replace for layer in layers)
    total = len(layers) * attention + count * dense + (len(layers) - count) * moe
    return float(setting.tokens * total)


def _attention(setting: Setting) -> dict[str, float]:
    """Of attention and the two norms; tensors of the width of the residual stream by name."""
    model, keep = setting.model, setting.policy == "none"
    heads, hidden = model.num_attention_heads, BF16 * model.hidden_size
    latents = BF16 * (model.kv_lora_rank + model.qk_rope_head_dim + (model.q_lora_rank or 0))
    normed = BF16 * (model.kv_lora_rank + (model.q_lora_rank or 0))
    qk = 2 * BF16 * heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    values = BF16 * heads * model.v_head_dim
    up = qk + values
    weights = heads * setting.sequence * (setting.sequence + ATTENTION_MIN_ROWS) // 2
    small = weights * setting.sequences <= ATTENTION_KEPT_ELEMENTS
    scales = FP32 * (3 + (model.q_lora_rank is not None))  # of the norms, one a token
    return {
        "norm_in": float(2 * hidden + latents + scales),
        "norm_out": float((2 * hidden + normed) * keep),
        "mla_up": float(up * keep),
        "attn_out": float(values),
        "attn_weights": BF16 * weights / setting.sequence * small * keep,
    }


def _dense(setting: Setting) -> dict[str, float]:
    width = setting.model.intermediate_size
    return {
        "swiglu_in": float(BF16 * 2 * width),
        "expert_down_in": float(BF16 * width * (setting.policy == "none")),
    }


def _experts(setting: Setting) -> dict[str, float]:
    """Of router, experts and what surrounds them."""
    model, keep = setting.model, setting.policy == "none"
    top_k, hidden, width = model.num_experts_per_tok, model.hidden_size, model.moe_intermediate_size
    both = (top_k + model.n_shared_experts) * width
    wide = BF16 if keep else FP8
    down = both + top_k * width * setting.weights_at_experts  # before and after the weights
    return {
        "router": float(
            FP32 * hidden * keep  # its input, widened
            + FP32 * (model.n_routed_experts + 4 * top_k)  # scores; weights, twice, and sums
            + INT64 * 6 * top_k  # indices, order and inverse, and those of the way
        ),
        "expert_up_in": wide * top_k * hidden,
        "swiglu_in": wide * 2 * both,
        "expert_down_in": float(BF16 * down * keep),
        "expert_out": float(BF16 * top_k * hidden * keep),
        "residual": float(BF16 * hidden * keep),  # with the shared expert's output added
    }
