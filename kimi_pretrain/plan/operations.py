"""What the operations of ``model`` save of a token for their backward, one by one, in order.

A layer is the list of its operations in the order of its forward: which tensors each reads in
backward, and from what a tensor may be computed again. All else follows from the list: bytes by
tag (activations.py), and what lies on the device while a backward goes through it (backward.py).
Tests walk real layers and real ranks against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from kimi_pretrain.config.activation import Policy, policies
from kimi_pretrain.config.schema import Config, ModelConfig
from kimi_pretrain.ops.runs import CALL_FLOPS, cheapest_runs
from kimi_pretrain.plan.flops import head_is_cut

BF16, FP32, INT64, FP64 = 2, 4, 8, 8
FP8 = 1 + FP32 / 128  # E4M3 and its tile's scale

# Softmax weights of attention are kept up to this many elements, those of so many rows together
# (ops/attention.py; a test compares).
ATTENTION_KEPT_ELEMENTS, ATTENTION_MIN_ROWS, ATTENTION_MAX_ROWS = 2**23, 64, 256


@dataclass(frozen=True)
class Setting:
    """What of a configuration decides how much is kept."""

    model: ModelConfig
    policies: Mapping[str, Policy]
    weights_at_experts: bool  # router weights multiply before the down-projection
    travels: bool  # rows go to experts on other ranks
    sequence: int  # tokens
    sequences: int  # of a microbatch
    padding: float = 1.0  # rows that experts multiply over those that they get
    load: float = 1.0  # rows that this rank's experts get, over those of balanced routing

    @classmethod
    def of(cls, config: Config, micro_batch_size: int) -> "Setting":
        """The setting of a run.

        Raises:
            ConfigError: an unknown activation policy.
        """
        model, length = config.model, config.data.sequence_length
        rows = length * micro_batch_size * model.num_experts_per_tok
        experts = model.n_routed_experts // config.parallel.ep
        width = model.moe_intermediate_size * model.hidden_size
        return cls(
            model,
            policies(config.activation),
            config.parallel.router_weights == "before_down",
            config.parallel.ep > 1,
            length,
            micro_batch_size,
            padding_of(rows, experts, width),
        )

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.sequence * self.sequences

    @property
    def rows(self) -> float:
        """At this rank's experts, for each of its own tokens."""
        return self.model.num_experts_per_tok * self.load


@cache
def padding_of(rows: int, experts: int, width: int) -> float:
    """Rows that are multiplied in bf16 over the ``rows`` that ``experts`` get, evenly.

    Experts of a handful of rows are multiplied together, as wide as the widest (ops/runs.py).

    Args:
        rows: of all experts of a rank.
        experts: of a rank.
        width: elements of one of an expert's three matrices.
    """
    even, more = divmod(rows, experts)
    sizes = [even] * (experts - more) + [even + 1] * more
    runs = cheapest_runs(sizes, CALL_FLOPS["bfloat16"] / (3 * width))
    return sum(run.total for run in runs) / rows


@dataclass(frozen=True, eq=False)
class Stored:
    """One storage that is saved."""

    tag: str  # config/activation.py
    size: float  # bytes a token
    source: tuple["Stored", ...] = ()  # from which it can be computed again


@dataclass(frozen=True, eq=False)
class Operation:
    """What one operation reads in its backward."""

    reads: tuple[Stored, ...]
    # Of a product with a weight: bytes a token of its output's gradient, which waits for W
    # together with what the product reads.
    owes: float = 0.0
    saves: tuple[Stored, ...] = ()  # named here and read by a later phase only


Segment = list[Operation]  # what is computed between two all-to-alls, in the order of the forward


def layer_operations(setting: Setting, moe: bool) -> list[Segment]:
    """Of one layer: attend, expert and combine; of a dense one, a single segment."""
    attention, hidden = _attention(setting)
    if not moe:
        return [[*attention, *_mlp(setting, hidden, setting.model.intermediate_size)]]
    order, inverse = (Stored("route", INT64 * setting.model.num_experts_per_tok) for _ in range(2))
    # How rows travelled, there from a layer's backward's beginning to its end.
    way = Operation((Stored("route", INT64 * 2 * setting.rows * setting.travels),))
    return [
        [way, *attention, *_router(setting, hidden, order, inverse)],
        _experts(setting, hidden),
        _combine(setting, order, inverse),
    ]


def embedding_operations() -> Segment:
    """Of the first stage's beginning."""
    return [Operation((Stored("tokens", INT64),))]


def head_operations(setting: Setting) -> Segment:
    """The last stage's end: the final norm and the loss, whose weight gradient never waits."""
    model, tokens = setting.model, setting.tokens
    hidden = BF16 * model.hidden_size
    x = Stored("norm_in", hidden + FP32)
    if head_is_cut(model, tokens):  # hidden states, labels and log-sum-exps
        normed = Stored("norm_out", hidden, (x,))
        return [Operation((x,)), Operation((normed, Stored("head", INT64 + FP32)))]
    # both gradients, computed in forward
    gradients = Stored("head", hidden * (tokens + model.vocab_size) / tokens)
    return [Operation((x,)), Operation((gradients,))]


def _product(x: Stored, width: float) -> Operation:
    """A product of ``x`` with a weight, to ``width`` bf16 numbers a token."""
    return Operation((x,), owes=BF16 * width)


def _attention(setting: Setting) -> tuple[Segment, Stored]:
    """Both norms and attention, and what the second norm gives."""
    model = setting.model
    heads, hidden = model.num_attention_heads, BF16 * model.hidden_size
    qk = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    v, kv_latent = heads * model.v_head_dim, model.kv_lora_rank + model.qk_rope_head_dim
    x = Stored("norm_in", hidden + FP32)  # and the norm's scale
    normed = Stored("norm_out", hidden, (x,))
    operations = [Operation((x,))]
    q_in = normed
    if model.q_lora_rank is not None:
        q_latent = Stored("norm_in", BF16 * model.q_lora_rank + FP32)
        q_in = Stored("norm_out", BF16 * model.q_lora_rank, (q_latent,))
        operations += [_product(normed, model.q_lora_rank), Operation((q_latent,))]
    latent = Stored("norm_in", BF16 * kv_latent + FP32)
    kv_in = Stored("norm_out", BF16 * model.kv_lora_rank, (latent,))
    heads_in = Stored("mla_up", BF16 * (2 * qk + v), (q_in, kv_in, latent))
    out = Stored("attn_out", BF16 * v)
    residual = Stored("norm_in", hidden + FP32)
    operations += [
        _product(normed, kv_latent),
        Operation((latent,)),
        _product(q_in, qk),
        _product(kv_in, heads * (model.qk_nope_head_dim + model.v_head_dim)),
        Operation((heads_in, out, *_softmax_weights(setting))),
        _product(out, model.hidden_size),
        Operation((residual,)),
    ]
    return operations, Stored("norm_out", hidden, (residual,))


def _softmax_weights(setting: Setting) -> tuple[Stored, ...]:
    """What attention keeps of short sequences: of blocks of rows, the keys that they may see."""
    length, heads = setting.sequence, setting.model.num_attention_heads
    counted = heads * length * (length + ATTENTION_MIN_ROWS) // 2 * setting.sequences
    if counted > ATTENTION_KEPT_ELEMENTS or setting.policies["attn_weights"].recompute:
        return ()
    size = min(max(ATTENTION_MIN_ROWS, length // 8), ATTENTION_MAX_ROWS)
    ends = [min(first + size, length) for first in range(0, length, size)]
    seen = sum(end * (end - first) for first, end in zip(range(0, length, size), ends, strict=True))
    return (Stored("attn_weights", BF16 * heads * seen / length),)


def _router(setting: Setting, hidden: Stored, order: Stored, inverse: Stored) -> Segment:
    model = setting.model
    top_k, experts = model.num_experts_per_tok, model.n_routed_experts
    high = Stored("router_in", FP32 * model.hidden_size, (hidden,))
    scores, total = Stored("router", FP32 * experts), Stored("router", FP32 * (top_k + 1))
    load = Stored("router", FP64 * experts / setting.sequence * (model.aux_loss_alpha > 0.0))
    chosen = Stored("route", INT64 * top_k)
    sent = (order,) if setting.weights_at_experts else ()  # takes the weights along
    return [
        Operation((high,), owes=FP32 * experts, saves=(hidden,)),
        Operation((scores, load)),
        Operation((chosen, total) if model.norm_topk_prob else (chosen,)),
        Operation((inverse, *sent), saves=(order,)),
    ]


def _mlp(setting: Setting, hidden: Stored, width: int) -> Segment:
    """A dense layer's MLP, or shared experts."""
    gate_up = Stored("swiglu_in", BF16 * 2 * width)
    inner = Stored("expert_down_in", BF16 * width, (gate_up,))
    return [
        _product(hidden, 2 * width),
        Operation((gate_up,)),
        _product(inner, setting.model.hidden_size),
    ]


def _experts(setting: Setting, hidden: Stored) -> Segment:
    """Routed experts, then shared ones."""
    model, rows = setting.model, setting.rows * setting.padding
    width = rows * model.moe_intermediate_size
    gate_up = Stored("swiglu_in", BF16 * 2 * width)
    # where each row lies among padded ones
    places = Stored("route", INT64 * setting.rows * (setting.padding > 1.0))
    operations = [
        Operation((places,)),
        _product(Stored("expert_up_in", BF16 * rows * model.hidden_size), 2 * width),
        Operation((gate_up,)),
    ]
    if setting.weights_at_experts:
        outputs = Stored("swiglu_out", BF16 * width, (gate_up,))
        weights = Stored("router", FP32 * rows)
        inner = Stored("expert_down_in", BF16 * width, (outputs, weights))
        operations.append(Operation((outputs, weights)))
    else:
        inner = Stored("expert_down_in", BF16 * width, (gate_up,))
    operations.append(_product(inner, rows * model.hidden_size))
    shared = model.n_shared_experts * model.moe_intermediate_size
    return [*operations, *_mlp(setting, hidden, shared)]


def _combine(setting: Setting, order: Stored, inverse: Stored) -> Segment:
    if setting.weights_at_experts:
        return [Operation((order,))]
    top_k = setting.model.num_experts_per_tok
    rows = Stored("expert_out", BF16 * top_k * setting.model.hidden_size)
    return [Operation((rows, Stored("router", FP32 * top_k), order, inverse))]
