"""Totals by addition against the parameters themselves."""

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.plan.shapes import stage_specs
from kimi_pretrain.plan.totals import ModelTotals, Totals


@pytest.mark.parametrize("name", ["k2", "deepseek_v3", "moonlight_16b", "k2_nano"])
@pytest.mark.parametrize("ep", [1, 4])
def test_a_stage_is_the_sum_of_its_parameters(name: str, ep: int) -> None:
    """Catches a dense layer taken for an expert layer, or an end of the model left out."""
    model = compose([f"model={name}"]).model
    totals, layers = ModelTotals(model, ep), model.num_hidden_layers
    for part in (range(layers), range(2), range(1, 3), range(layers - 2, layers)):
        assert totals.stage(part) == Totals.of(stage_specs(model, part, ep))
    both = totals.rank([range(1), range(1, layers)])
    assert both == totals.stage(range(layers))


@pytest.mark.parametrize("dense", [0, 4])
def test_models_of_one_kind(dense: int) -> None:
    """Catches a first layer that is not dense, a last one that is."""
    model = compose([f"model.first_k_dense_replace={dense}"]).model
    everything = range(model.num_hidden_layers)
    assert ModelTotals(model, 1).stage(everything) == Totals.of(stage_specs(model, everything))
