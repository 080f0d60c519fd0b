import math

from kimi_pretrain.telemetry.scalars import scalars


def test_numbers_are_named_by_kind_and_the_step_is_no_curve() -> None:
    row = {"step": 3, "loss": 2.5, "tokens": 64, "mfu": None, "sample": "text"}
    assert scalars("step", row) == {"step/loss": 2.5, "step/tokens": 64.0}


def test_domains_become_curves_of_their_own() -> None:
    row = {"step": 3, "heldout_loss": 2.0, "domains": {"code": 1.5, "prose": 2.5}}
    assert scalars("eval", row) == {
        "eval/heldout_loss": 2.0,
        "eval/domains/code": 1.5,
        "eval/domains/prose": 2.5,
    }


def test_per_layer_arrays_become_one_number_a_layer() -> None:
    row = {
        "step": 3,
        "max_logits": [[-3.0, -1.0], [7.0, 2.0]],
        "exact": [[True, False], [True, True]],
        "clipped": [[False, False], [True, False]],
        "expert_load": [[0.5, 0.25, 0.25]],
    }
    assert scalars("layers", row) == {
        "layers/max_logit/00": -1.0,
        "layers/max_logit/01": 7.0,
        "layers/clipped_share/00": 0.0,
        "layers/clipped_share/01": 0.5,
        "layers/load_max_over_mean/00": 1.5,
    }


def test_a_layer_without_tokens_has_no_load_instead_of_a_division_by_zero() -> None:
    (load,) = scalars("layers", {"step": 1, "expert_load": [[0.0, 0.0]]}).values()
    assert math.isnan(load)
