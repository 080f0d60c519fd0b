"""What a layer keeps of a token for its backward, tensor by tensor.

Sizes are those of the tensors that the operations of ``model`` save, by the tags that they give
them (config/activation.py); a test walks a real layer. A policy then says which of them are
computed again and take nothing, which lie in FP8 with a scale for 128 values, and which in the
host's memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kimi_pretrain.config.activation import Policy, policies
from kimi_pretrain.config.schema import Config, ModelConfig
from kimi_pretrain.plan.flops import head_is_cut

BF16, FP32, INT64 = 2, 4, 8
FP8 = 1 + FP32 / 128  # E4M3 and its tile's scale

# Softmax weights of attention are kept up to this many (ops/attention.py; a test compares).
ATTENTION_KEPT_ELEMENTS, ATTENTION_MIN_ROWS = 2**23, 64
# Tags that a product with a weight reads.
PRODUCT_INPUTS = ("norm_out", "attn_out", "router_in", "expert_up_in", "expert_down_in")

Sizes = dict[str, float]  # bytes by tag


@dataclass(frozen=True)
class Setting:
    """What of a configuration decides how much is kept."""

    model: ModelConfig
    policies: Mapping[str, Policy]
    weights_at_experts: bool  # router weights multiply before the down-projection
    travels: bool  # rows go to experts on other ranks
    sequence: int  # tokens
    sequences: int  # of a microbatch

    @classmethod
    def of(cls, config: Config, micro_batch_size: int) -> "Setting":
        """The setting of a run.

        Raises:
            ConfigError: an unknown activation policy.
        """
        return cls(
            config.model,
            policies(config.activation),
            config.parallel.router_weights == "before_down",
            config.parallel.ep > 1,
            config.data.sequence_length,
            micro_batch_size,
        )

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.sequence * self.sequences


@dataclass(frozen=True)
class Segment:
    """Bytes of what a stage computes between two all-to-alls of its forward."""

    kept: float  # for backward, on the device until it leaves
    again: float  # computed again; on the device only after a RECOMPUTE
    inputs: float  # of matrix products: they wait for W on the device, whatever their policy


@dataclass(frozen=True)
class Kept:
    """Bytes that one microbatch leaves on a stage for its backward, by tag."""

    stays: dict[str, float]  # on the device
    leaves: dict[str, float]  # for the host, where the schedule has the time
    again: dict[str, float]  # nowhere: computed again, and on the device from then on
    segments: tuple[Segment, ...]  # the same in the order of the forward
    until_w: float = 0.0  # beside it: what weight gradients wait with, from I on
    layers: int = 1

    @property
    def device(self) -> float:
        """What never leaves."""
        return sum(self.stays.values())

    @property
    def host(self) -> float:
        """What may leave."""
        return sum(self.leaves.values())

    @property
    def total(self) -> float:
        return self.device + self.host

    @property
    def inputs(self) -> float:
        """What waits between I and W."""
        return sum(segment.inputs for segment in self.segments)


def layer_kept(setting: Setting, moe: bool) -> dict[str, float]:
    """Bytes a token that one layer keeps, on the device or the host, with balanced routing."""
    kept = _kept(setting, layer_phases(setting, moe))
    return kept.stays | kept.leaves


def layer_leaves(setting: Setting, moe: bool) -> float:
    """Bytes a token of one layer that may leave the device."""
    return _kept(setting, layer_phases(setting, moe)).host


def stage_kept(setting: Setting, layers: range) -> Kept:
    """What one microbatch leaves on a stage for its backward."""
    model, tokens = setting.model, setting.tokens
    parts: list[Sizes] = [{}]
    if layers.start == 0:
        parts[0]["tokens"] = float(INT64 * tokens)
    for layer in layers:
        attend, *rest = layer_phases(setting, layer >= model.first_k_dense_replace)
        _add(parts[-1], attend, tokens)
        for phase in rest:
            parts.append({})
            _add(parts[-1], phase, tokens)
    if layers.stop == model.num_hidden_layers:
        hidden = BF16 * model.hidden_size
        head = {"norm_in": float((hidden + FP32) * tokens)}
        if head_is_cut(model, tokens):  # hidden states, labels and log-sum-exps
            head |= {"norm_out": float(hidden * tokens), "head": float((INT64 + FP32) * tokens)}
        else:  # both gradients, computed in forward
            head["head"] = float(hidden * (tokens + model.vocab_size))
        _add(parts[-1], head, 1)
    kept = _kept(setting, parts)
    return replace(kept, until_w=gradients_until_w(setting, layers), layers=len(layers))


def _kept(setting: Setting, parts: Sequence[Sizes]) -> Kept:
    """What the policies make of tensors as they are saved, in bytes by tag and segment."""
    stays, leaves, again = Sizes(), Sizes(), Sizes()
    segments = []
    for part in parts:
        size = made = 0.0
        for tag, full in part.items():
            policy = setting.policies.get(tag, Policy())
            if policy.recompute:
                _add(again, {tag: full}, 1)
                made += full
            elif full:
                here = full * FP8 / BF16 if policy.fp8 else full
                _add(leaves if policy.offload else stays, {tag: here}, 1)
                size += here
                if policy.fp8 and tag == "swiglu_in" and _feeds_a_chain(setting):
                    _add(again, {tag: full - here}, 1)  # what its output is computed from
                    made += full - here
        inputs = sum(part.get(tag, 0.0) for tag in PRODUCT_INPUTS)
        segments.append(Segment(size, made, inputs))
    return Kept(stays, leaves, again, tuple(segments))


def _feeds_a_chain(setting: Setting) -> bool:
    """Whether SwiGLU runs again from its input."""
    return any(setting.policies[tag].recompute for tag in ("swiglu_out", "expert_down_in"))


def _add(total: Sizes, sizes: Mapping[str, float], times: float) -> None:
    for tag, size in sizes.items():
        total[tag] = total.get(tag, 0.0) + size * times


def layer_phases(setting: Setting, moe: bool) -> list[Sizes]:
    """Bytes a token of one layer by tag: of its one phase, or of attend, expert and combine."""
    attention = _attention(setting)
    return (
        [attention | _router(setting), *_experts(setting)] if moe else [attention | _dense(setting)]
    )


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


def _attention(setting: Setting) -> Sizes:
    """Bytes a token of attention and the two norms."""
    model = setting.model
    heads, hidden = model.num_attention_heads, BF16 * model.hidden_size
    latents = BF16 * (model.kv_lora_rank + model.qk_rope_head_dim + (model.q_lora_rank or 0))
    normed = BF16 * (model.kv_lora_rank + (model.q_lora_rank or 0))
    qk = 2 * BF16 * heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    values = BF16 * heads * model.v_head_dim
    weights = heads * setting.sequence * (setting.sequence + ATTENTION_MIN_ROWS) // 2
    small = weights * setting.sequences <= ATTENTION_KEPT_ELEMENTS
    scales = FP32 * (3 + (model.q_lora_rank is not None))  # of the norms, one a token
    return {
        "norm_in": float(2 * hidden + latents + scales),
        "norm_out": float(2 * hidden + normed),
        "mla_up": float(qk + values),
        "attn_out": float(values),
        "attn_weights": BF16 * weights / setting.sequence * small,
    }


def _dense(setting: Setting) -> Sizes:
    width = setting.model.intermediate_size
    return {"swiglu_in": float(BF16 * 2 * width), "expert_down_in": float(BF16 * width)}


def _router(setting: Setting) -> Sizes:
    model = setting.model
    top_k = model.num_experts_per_tok
    return {
        "router_in": float(FP32 * model.hidden_size),
        "router": float(FP32 * (model.n_routed_experts + top_k + 1)),  # scores, weights, their sum
        "route": float(INT64 * 3 * top_k),  # indices, order and its inverse
        # How rows travelled: no operation saves it, so that it has no policy and stays.
        "way": float(INT64 * 2 * top_k * setting.travels),
    }


def _experts(setting: Setting) -> tuple[Sizes, Sizes]:
    """Of experts, and of what comes back from them."""
    model = setting.model
    top_k, hidden, width = model.num_experts_per_tok, model.hidden_size, model.moe_intermediate_size
    both = (top_k + model.n_shared_experts) * width
    weights = {"router": float(FP32 * top_k)}
    inside = {
        "expert_up_in": float(BF16 * top_k * hidden),
        "swiglu_in": float(BF16 * 2 * both),
        "expert_down_in": float(BF16 * both),
    }
    if setting.weights_at_experts:
        return inside | weights | {"swiglu_out": float(BF16 * top_k * width)}, {}
    return inside, {"expert_out": float(BF16 * top_k * hidden)} | weights
