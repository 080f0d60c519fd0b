"""Choice, weights and balancing of the router."""

from collections.abc import Callable

import pytest
import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.router import Router, choose_experts, update_bias

TinyConfig = Callable[..., ModelConfig]


def router(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> Router:
    torch.manual_seed(0)
    built = Router(cfg, dtype)
    torch.nn.init.normal_(built.weight)
    return built


def test_the_bias_chooses_and_does_not_weigh(tiny: TinyConfig) -> None:
    """Weights from biased scores would let the balancing change the function."""
    cfg = tiny(num_experts_per_tok=2)
    gate = router(cfg)
    gate.e_score_correction_bias[7] = 10.0
    hidden = torch.randn(1, 5, cfg.hidden_size, dtype=torch.float64)
    routing = gate(hidden)
    assert bool((routing.indices == 7).any(dim=1).all())
    scores = torch.sigmoid(hidden[0] @ gate.weight.T).gather(1, routing.indices)
    want = 2.827 * scores / scores.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights, want, rtol=1e-12, atol=0)


def test_a_large_negative_bias_keeps_an_expert_out(tiny: TinyConfig) -> None:
    cfg = tiny()
    gate = router(cfg)
    gate.e_score_correction_bias[3] = -10.0
    routing = gate(torch.randn(2, 9, cfg.hidden_size, dtype=torch.float64))
    assert not bool((routing.indices == 3).any())


def test_scores_that_underflow_give_zero_weights_not_nan(tiny: TinyConfig) -> None:
    """The normaliser adds 1e-20: every sigmoid may be 0 in fp32."""
    cfg = tiny()
    gate = router(cfg, torch.float32)
    torch.nn.init.constant_(gate.weight, -10.0)
    routing = gate(torch.ones(1, 2, cfg.hidden_size))
    assert bool((routing.weights == 0.0).all())


def test_bf16_model_routes_in_fp32_with_an_fp32_bias(tiny: TinyConfig) -> None:
    """bf16 logits tie among experts; a bf16 bias of 0.5 cannot move by 0.001."""
    cfg = tiny()
    gate = router(cfg, torch.bfloat16)
    hidden = torch.randn(2, 30, cfg.hidden_size).bfloat16()
    routing = gate(hidden)
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert routing.weights.dtype == torch.float32
    scores = torch.sigmoid(hidden.double() @ gate.weight.double().T).flatten(0, 1)
    chosen = scores.topk(cfg.num_experts_per_tok).values
    want = 2.827 * chosen / chosen.sum(1, keepdim=True)
    got = routing.weights.double().sort(1, descending=True).values
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_a_masked_group_loses_against_negative_scores(tiny: TinyConfig) -> None:
    """Masked with 0 instead of -inf, an expert outside the groups beats a negative one inside."""
    cfg = tiny(n_group=3, topk_group=1, num_experts_per_tok=3)
    bias = torch.full((12,), -5.0)
    bias[4:8] = -3.0  # the middle group is the best, and still negative
    chosen = choose_experts(torch.rand(6, 12), bias, cfg)
    assert bool(((chosen >= 4) & (chosen < 8)).all())


def test_a_group_is_worth_its_two_best(tiny: TinyConfig) -> None:
    """Not its best one (group 0), not the sum of all (group 2)."""
    cfg = tiny(n_group=3, topk_group=1, num_experts_per_tok=1)
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.8, 0.7, 0.0, 0.0, 0.4, 0.4, 0.4, 0.4]])
    assert choose_experts(scores, torch.zeros(12), cfg).tolist() == [[4]]


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_the_k_best_are_chosen(tiny: TinyConfig, k: int) -> None:
    scores = torch.rand(50, 12)
    bias = torch.randn(12)
    chosen = choose_experts(scores, bias, tiny(num_experts_per_tok=k))
    want = (scores + bias).topk(k).indices
    assert torch.equal(chosen.sort(1).values, want.sort(1).values)


def test_counts_are_kept_per_sequence(tiny: TinyConfig) -> None:
    """The auxiliary loss is about balance within one sequence."""
    cfg = tiny()
    routing = router(cfg)(torch.randn(3, 7, cfg.hidden_size, dtype=torch.float64))
    by_sequence = routing.indices.view(3, -1)
    want = torch.stack([torch.bincount(s, minlength=12) for s in by_sequence])
    assert torch.equal(routing.counts, want)


def test_no_auxiliary_loss_without_a_scale_or_alpha(tiny: TinyConfig) -> None:
    hidden = torch.randn(1, 4, 40, dtype=torch.float64)
    assert router(tiny())(hidden).aux_loss is None
    assert router(tiny(aux_loss_alpha=0.0))(hidden, 1.0).aux_loss is None


def test_balanced_sequences_have_auxiliary_loss_alpha(tiny: TinyConfig) -> None:
    """Both f and P are normalised as in equations 17 to 20: 1 at balance."""
    cfg = tiny(n_routed_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.25)
    gate = router(cfg)
    torch.nn.init.zeros_(gate.weight)  # all scores equal: P is 1 / experts
    routing = gate(torch.randn(2, 6, cfg.hidden_size, dtype=torch.float64), 1.0)
    assert routing.aux_loss is not None
    assert abs(routing.aux_loss.item() - 0.25) < 1e-12


def test_update_moves_against_the_load_in_place() -> None:
    """The sign, the mean as the pivot, and an expert exactly at the mean left alone."""
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_bias(bias, torch.tensor([4, 6, 5, 5]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([0.501, 0.499, 0.5, 0.5]), rtol=0, atol=1e-7)
