"""Seconds of every phase of a layer on a GPU: the simulator's costs, from shapes.

Products take their FLOPs over the rate of their kind; what is neither a product nor attention is
limited by the GPU's memory and takes its bytes over that. Nothing is measured here.
"""

from collections.abc import Sequence

from kimi_pretrain.config.activation import offloads
from kimi_pretrain.config.schema import Config, ModelConfig
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases
from kimi_pretrain.plan.activations import Setting, layer_leaves, layer_phases
from kimi_pretrain.plan.communication import all_to_all, message
from kimi_pretrain.plan.flops import (
    head_flops,
    head_is_cut,
    head_products,
    layer_flops,
    up_projection_flops,
)
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.operations import FP8
from kimi_pretrain.plan.shapes import stage_specs

BF16 = 2
# The backward of attention computes the scores again: 5 products where the forward has 2.
ATTENTION_BACKWARD = 2.5
# A backward of what memory limits reads the forward's input and the gradient, writes another.
BACKWARD_TRAFFIC = 1.5
ACCUMULATION_BYTES = 8  # a weight's fp32 gradient is read and written by each product


def run_costs(config: Config, layers: Sequence[range], hardware: Hardware) -> Costs:
    """The costs of a run's schedule, whose stages hold ``layers``.

    The simulator knows one kind of layer. Dense layers on the first stage are counted beside its
    MoE layers; where it has none, or on later stages, they count as MoE layers, which multiply
    about as much and send more.
    """
    topology = Topology.of_config(config.parallel)
    setting = Setting.of(config, micro_batch_size(config))
    model, tokens = config.model, setting.tokens
    sends = all_to_all(config, topology, hardware, tokens).seconds(hardware)
    any_moe = model.first_k_dense_replace < model.num_hidden_layers
    forward, backward, weight = _layer(config, setting, any_moe, hardware)
    way = sends if any_moe else 0.0
    again = _again(setting, any_moe, hardware)
    ahead = config.activation.ahead  # RECOMPUTE nodes have it, else the backward
    forward = Phases(forward.attend, way, forward.expert, way)
    backward = Phases(
        backward.attend + again.attend * (not ahead),
        way,
        backward.expert + again.expert * (not ahead),
        way,
    )
    counts = [len(part) for part in layers]
    first = _embedding(model, tokens, hardware)
    apart = min(model.first_k_dense_replace, counts[0] - 1) if any_moe else 0
    if apart and model.first_k_dense_replace < counts[0]:
        phases = _layer(config, setting, False, hardware)
        counts[0] -= apart
        first = Extra(
            *(
                was + apart * phase.compute
                for was, phase in zip(
                    (first.forward, first.backward, first.weight), phases, strict=True
                )
            )
        )
    copies = 0.0
    if offloads(config.activation):
        copies = tokens * layer_leaves(setting, any_moe) / hardware.host
    return Costs(
        layers=tuple(counts),
        forward=forward,
        backward=backward,
        weight=weight,
        first=first,
        last=_head(model, tokens, hardware),
        p2p=message(config, topology, hardware, tokens).seconds(hardware),
        offload=copies,
        prefetch=copies,
        recompute=again.compute * ahead,
    )


def _layer(
    config: Config, setting: Setting, moe: bool, hardware: Hardware
) -> tuple[Phases, Phases, Phases]:
    """Compute seconds of forward, input gradients and weight gradients of one microbatch."""
    model, tokens = config.model, setting.tokens
    flops = layer_flops(model, moe, setting.sequence)
    around, inside = _traffic(model, moe)
    projections = tokens * flops.projections / hardware.matmul
    attention = tokens * flops.attention / hardware.attention
    products = tokens * (flops.dense / hardware.matmul + flops.routed / hardware.grouped_matmul)
    outer, inner = tokens * around / hardware.memory, tokens * inside / hardware.memory
    codes = tokens * _fp8_traffic(setting, moe) / hardware.memory  # each way
    outside, experts = _weights(model, moe, config.parallel.ep)
    return (
        Phases(attend=projections + attention + outer, expert=products + inner + codes),
        Phases(
            attend=projections + ATTENTION_BACKWARD * attention + BACKWARD_TRAFFIC * outer,
            expert=products + BACKWARD_TRAFFIC * inner + codes,
        ),
        Phases(
            attend=max(projections, ACCUMULATION_BYTES * outside / hardware.memory),
            expert=max(products, ACCUMULATION_BYTES * experts / hardware.memory),
        ),
    )


def _again(setting: Setting, moe: bool, hardware: Hardware) -> Phases:
    """What a layer's policies compute again for one microbatch."""
    model, policies = setting.model, setting.policies
    hidden, latents = model.hidden_size, model.kv_lora_rank + (model.q_lora_rank or 0)
    attend = inside = 0.0  # bytes a token
    flops = 0
    if policies["norm_out"].recompute:
        attend += 2 * BF16 * (2 * hidden + latents)
    if policies["mla_up"].recompute:
        flops = up_projection_flops(model)
        attend += 2 * _full(setting, moe, "mla_up")
    if moe and policies["router_in"].recompute:
        attend += 3 * BF16 * hidden
    for tag in ("swiglu_out", "expert_down_in"):
        if policies[tag].recompute:
            inside += 3 * _full(setting, moe, tag)
    compute = flops / hardware.matmul + attend / hardware.memory
    return Phases(attend=setting.tokens * compute, expert=setting.tokens * inside / hardware.memory)


def _fp8_traffic(setting: Setting, moe: bool) -> float:
    """Bytes a token that are read and written to bring a layer's tensors to FP8, or back."""
    tags = [tag for tag, policy in setting.policies.items() if policy.fp8]
    return sum(_full(setting, moe, tag) * (1 + FP8 / BF16) for tag in tags)


def _full(setting: Setting, moe: bool, tag: str) -> float:
    """Bytes a token of a layer's tensors as they are before a policy."""
    return sum(phase.get(tag, 0.0) for phase in layer_phases(setting, moe))


def _traffic(model: ModelConfig, moe: bool) -> tuple[float, float]:
    """Bytes a token that a forward reads and writes outside products: around experts, inside."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    q = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    kv = heads * (model.qk_nope_head_dim + model.v_head_dim)
    latents = model.kv_lora_rank + (model.q_lora_rank or 0)
    around = 2 * 2 * hidden + 2 * 3 * hidden  # two norms; two sums
    around += 2 * latents + 2 * (q + kv)  # inner norms; rotation and sharing of heads
    if not moe:
        return BF16 * around, BF16 * 3 * model.intermediate_size
    rows = model.num_experts_per_tok * hidden
    around += 2 * rows + rows + hidden  # taken out, brought back
    around += 2 * hidden + 3 * model.n_routed_experts  # the router's fp32 input and scores
    both = model.num_experts_per_tok + model.n_shared_experts
    inside = 3 * both * model.moe_intermediate_size + 2 * rows  # SwiGLU; arrival to expert order
    return BF16 * around, BF16 * inside


def _weights(model: ModelConfig, moe: bool, ep: int) -> tuple[int, int]:
    """Elements of one layer's weights on a rank: outside and inside the expert phase."""
    layer = model.num_hidden_layers - 1 if moe else 0
    specs = [s for s in stage_specs(model, range(layer, layer + 1), ep) if ".mlp." in s.name]
    inside = sum(spec.elements for spec in specs if ".mlp.gate." not in spec.name)
    whole = [s for s in stage_specs(model, range(layer, layer + 1), ep) if ".layers." in s.name]
    return sum(spec.elements for spec in whole) - inside, inside


def _embedding(model: ModelConfig, tokens: int, hardware: Hardware) -> Extra:
    row = tokens * model.hidden_size / hardware.memory
    return Extra(forward=2 * BF16 * row, weight=(BF16 + ACCUMULATION_BYTES) * row)


def _head(model: ModelConfig, tokens: int, hardware: Hardware) -> Extra:
    """The weight's gradient is accumulated in backward, where forward has not computed it."""
    product = tokens * head_flops(model) / hardware.matmul
    forward, backward = head_products(model, tokens)
    matrix = model.vocab_size * model.hidden_size / hardware.memory
    traffic = ACCUMULATION_BYTES + (0 if head_is_cut(model, tokens) else 2 * BF16)
    return Extra(forward=forward * product, backward=backward * product + traffic * matrix)
