"""Every figure that the reference marks as a check, and the published speed of DeepSeek-V3."""

from functools import cache
from itertools import pairwise

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.plan.communication import all_to_all, all_to_all_bytes_per_token, message
from kimi_pretrain.plan.flops import (
    head_flops,
    inference_flops_per_token,
    layer_flops,
    newton_schulz_flops_per_step,
    recomputed_flops,
    training_flops_per_token,
)
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.layout_report import GRADIENT_BYTES, PARAMETER_BYTES
from kimi_pretrain.plan.memory import static_without_padding
from kimi_pretrain.plan.parameters import count_parameters
from kimi_pretrain.plan.run_plan import Plan, memory_of_run, plan_run, token_budget
from kimi_pretrain.plan.totals import ModelTotals

GB = 1e9
K2 = "experiment=k2_1t_h800_2048"


@cache
def plan(*overrides: str) -> Plan:
    return plan_run(compose(overrides))


def model(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("k2", (1_026_408_209_408, 23_040, 30_512_667_648, 31_687_072_768, 32_861_477_888)),
        ("deepseek_v3", (671_026_404_352, 14_848, 35_698_924_544, 36_625_603_584, 37_552_282_624)),
        ("moonlight_16b", (15_960_108_544, 1_664, 2_243_685_888, 2_579_230_208, 2_914_774_528)),
    ],
)
def test_parameters(name: str, counts: tuple[int, ...]) -> None:
    """Catches a way of counting that lost or gained a matrix."""
    c = count_parameters(model(name))
    got = c.total, c.router_bias, c.active_without_embedding, c.active_with_head, c.active_with_both
    assert got == counts


@pytest.mark.parametrize("name", ["k2", "deepseek_v3", "moonlight_16b"])
def test_flops_by_layer_are_those_of_the_model(name: str) -> None:
    """Catches seconds of a step made from other FLOPs than its MFU."""
    m, length = model(name), 4096
    total = 3 * head_flops(m)
    for layer in range(m.num_hidden_layers):
        flops = layer_flops(m, layer >= m.first_k_dense_replace, length)
        total += 3 * (flops.matrices + flops.attention)
    assert total == training_flops_per_token(m, length)


def test_flops_of_a_step_and_newton_schulz() -> None:
    """Catches 4.85e16 counted a rank, a replica or a single step of five."""
    k2 = plan(K2)
    assert k2.step_tokens == 67_108_864
    assert k2.step_tokens * k2.flops_per_token == pytest.approx(1.379e19, rel=1e-3)
    assert newton_schulz_flops_per_step(model("k2")) == pytest.approx(4.85e16, rel=1e-3)
    assert round(100 * k2.newton_schulz_share, 2) == 0.35


def test_twice_the_heads_cost_83_percent_at_128k() -> None:
    """Catches attention over half the context, or projections that grow with the heads."""
    m, context = model("k2"), 131_072
    ratio = inference_flops_per_token(m, context, 128) / inference_flops_per_token(m, context)
    assert round(100 * (ratio - 1), 1) == 83.3


def test_selective_recomputation() -> None:
    """Catches a dense layer whose down-projection is recomputed: 19.18 GFLOP a token."""
    m = model("k2")
    total = sum(recomputed_flops(m, layer >= 1) for layer in range(61))
    assert round(total / 1e9, 2) == 19.18


@pytest.mark.parametrize("split", ["even", "balanced"])
def test_parameters_and_gradients_of_every_rank(split: str) -> None:
    """Catches bytes of another model or another split than 15 x 4 and 1."""
    memory = plan(K2, f"parallel.layer_split={split}").memory
    held = [(rank.parameters + rank.gradients) / GB for rank in memory]
    assert [round(value, 2) for value in held] == [31.72, *[28.92] * 14, 14.28]


def test_parameters_and_gradients_of_a_split_by_hand() -> None:
    """Catches an embedding or a head with the wrong stage: 3, 14 x 4 and 2 layers."""
    edges = [0, *range(3, 60, 4), 61]
    layers = [range(start, stop) for start, stop in pairwise(edges)]
    assert [len(part) for part in layers] == [3, *[4] * 14, 2]
    held = static_without_padding(compose([K2]), layers, [[stage] for stage in range(16)])
    both = [round((rank.parameters + rank.gradients) / GB, 2) for rank in held]
    assert both == [24.49, *[28.92] * 14, 21.51]


def test_bytes_of_the_model_and_of_a_layer() -> None:
    """Catches a width of parameters or gradients, or experts that are not divided by ep."""
    width = PARAMETER_BYTES + GRADIENT_BYTES
    assert round(width * count_parameters(model("k2")).total / 1e12, 2) == 6.16
    assert round(width * ModelTotals(model("k2"), ep=16).moe.elements / GB, 3) == 7.229


@pytest.mark.parametrize(
    ("nodes", "gigabytes"), [(32, 34.12), (64, 17.06), (128, 8.53), (256, 4.26), (512, 2.13)]
)
def test_zero1_state_of_a_four_layer_stage(nodes: int, gigabytes: float) -> None:
    """Catches state sharded over the wrong replicas."""
    config = compose([K2, f"parallel.dp={nodes // 2}", "schedule.global_batch_size=4096"])
    memory = memory_of_run(config)
    assert memory[5].optimizer / GB == pytest.approx(gigabytes, abs=0.01)


def test_what_k2_sends() -> None:
    """Catches bytes of the all-to-all, its links, a message or ZeRO-1 against the reference."""
    config = compose([K2, "parallel.dispatcher=all_to_all"])
    topology, hardware = Topology.of_config(config.parallel), Hardware.of(config.cluster)
    sent = all_to_all(config, topology, hardware, 4096)
    assert all_to_all_bytes_per_token(config.model) == 114_688
    everywhere = sent.total * topology.ep / (topology.ep - 1)  # to the own rank too
    assert round(everywhere / 1e6, 1) == 469.8
    assert round(sent.nvlink / 1e6, 1) == 205.5
    assert round(sent.rdma / 1e6, 1) == 234.9
    assert round(message(config, topology, hardware, 4096).total / 1e6, 2) == 58.72
    replica = plan(K2).replicas[5]
    both = replica.reduce_scatter.total + replica.all_gather.total
    assert both / GB == pytest.approx(25.7, abs=0.05)


def test_k2s_token_budget() -> None:
    """Catches stages counted in steps that weigh nothing: 15.9T with the anneal."""
    config = compose([K2])
    assert token_budget(config) == 15_900_000_000_000 + 500 * 67_108_864


def test_deepseek_v3_on_2048_h800_is_as_fast_as_published() -> None:
    """Catches efficiencies that fit one model only, and the speed of a run that has no room:
    1,543 tokens/s/GPU within 15 %, on GPUs that hold it."""
    deepseek = plan("experiment=deepseek_v3_h800_2048")
    assert deepseek.fits
    assert deepseek.topology.world == 2048
    assert (deepseek.topology.pp, deepseek.topology.ep) == (16, 64)
    assert deepseek.tokens_per_gpu_second == pytest.approx(1543, rel=0.15)
    assert deepseek.config.cluster == plan(K2).config.cluster


def test_dualpipe_v_puts_off_a_stage_for_every_rank_before_it() -> None:
    """Catches 16 microbatches that wait for W planned as one: a dry run counts 77 GB."""
    free = plan("experiment=deepseek_v3_h800_2048", "parallel.weight_grads_held=null").fullest
    assert free.rank == 15
    assert free.activations + free.weight_gradients > 75e9
    tight = plan("experiment=deepseek_v3_h800_2048").fullest
    assert tight.weight_gradients == pytest.approx(free.weight_gradients / 4, rel=0.05)
