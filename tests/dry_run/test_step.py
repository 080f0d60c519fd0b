"""What a dry step decides in place of values."""

from dataclasses import replace

import pytest
import torch

from kimi_pretrain.config import compose
from kimi_pretrain.dry_run.step import balanced_choice


@pytest.mark.parametrize(("tokens", "experts", "k"), [(4096, 384, 8), (64, 8, 2), (5, 3, 2)])
def test_a_balanced_choice_is_one(tokens: int, experts: int, k: int) -> None:
    """Catches an expert chosen twice by a token, and loads that differ by more than one."""
    cfg = replace(compose(["model=k2"]).model, n_routed_experts=experts, num_experts_per_tok=k)
    scores, bias = torch.empty(tokens, experts, device="meta"), torch.empty(experts, device="meta")
    chosen = balanced_choice(scores, bias, cfg)
    assert chosen.shape == (tokens, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    loads = torch.bincount(chosen.flatten(), minlength=experts)
    assert int(loads.max() - loads.min()) <= 1
