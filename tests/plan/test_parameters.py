"""Parameter counts against the published configurations (reference figures)."""

from dataclasses import replace

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.plan.parameters import attention_parameters, count_parameters
from kimi_pretrain.plan.shapes import stage_specs
from kimi_pretrain.plan.totals import ModelTotals

PUBLISHED = {
    "k2": (1_026_408_209_408, 23_040, 30_512_667_648, 31_687_072_768, 32_861_477_888),
    "deepseek_v3": (671_026_404_352, 14_848, 35_698_924_544, 36_625_603_584, 37_552_282_624),
    "moonlight_16b": (15_960_108_544, 1_664, 2_243_685_888, 2_579_230_208, 2_914_774_528),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_models(name: str) -> None:
    """Catches a forgotten norm, a router counted twice, or a shared expert left out."""
    count = count_parameters(compose([f"model={name}"]).model)
    assert (
        count.total,
        count.router_bias,
        count.active_without_embedding,
        count.active_with_head,
        count.active_with_both,
    ) == PUBLISHED[name]


def test_the_parts_of_k2() -> None:
    """Catches a sum that is right by two errors, and shapes of another layer than its count."""
    model = compose(["model=k2"]).model
    layer = {spec.name.removeprefix("model.layers.60."): spec.elements for spec in _last_layer()}
    inner_norms = model.kv_lora_rank + (model.q_lora_rank or 0)
    assert attention_parameters(model) - inner_norms == 101_122_048
    projections = [n for name, n in layer.items() if "self_attn" in name and "norm" not in name]
    assert sum(projections) == 101_122_048
    routed = layer["mlp.experts.gate_up_proj"] + layer["mlp.experts.down_proj"]
    assert routed == 384 * 44_040_192
    shared = [n for name, n in layer.items() if "shared_experts" in name]
    assert sum(shared) == 44_040_192
    assert layer["mlp.gate.weight"] == 2_752_512
    totals, count = ModelTotals(model, 1), count_parameters(model)
    assert totals.moe.elements == 17_059_364_864
    assert totals.dense.elements == 497_500_160
    assert count.embedding == count.head == 1_174_405_120


def _last_layer() -> list[Spec]:
    specs = stage_specs(compose(["model=k2"]).model, range(60, 61))
    return [spec for spec in specs if ".layers." in spec.name]


def test_what_k2s_report_calls_1_04_trillion() -> None:
    """Catches a count that follows the first dense layer wherever it is said not to be."""
    model = compose(["model=k2"]).model
    total, hidden = count_parameters(model).total, model.hidden_size
    everywhere = count_parameters(replace(model, first_k_dense_replace=0)).total
    assert round(everywhere / 1e12, 4) == 1.0430
    # a prediction layer: an expert layer, the product that joins two hidden states, three norms
    joined = 2 * hidden * hidden + 3 * hidden
    assert round((total + ModelTotals(model, 1).moe.elements + joined) / 1e12, 4) == 1.0436
