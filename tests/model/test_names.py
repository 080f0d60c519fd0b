"""Unstacking into Hugging Face names."""

import pytest
import torch

from kimi_pretrain.model.names import hf_views

LAYER = "model.layers.3.mlp"


def test_experts_unstack_gate_first_and_down_apart() -> None:
    """Gate and up exchanged, or experts counted from another rank's first."""
    stack = torch.arange(2 * 2 * 3 * 4).view(2, 2, 3, 4)
    views = dict(hf_views(f"{LAYER}.experts.gate_up_proj", stack, first_expert=6))
    assert list(views) == [
        f"{LAYER}.experts.{e}.{part}_proj.weight" for e in (6, 7) for part in ("gate", "up")
    ]
    assert torch.equal(views[f"{LAYER}.experts.7.up_proj.weight"], stack[1, 1])
    views = dict(hf_views(f"{LAYER}.experts.down_proj", stack[:, 0]))
    assert torch.equal(views[f"{LAYER}.experts.1.down_proj.weight"], stack[1, 0])


@pytest.mark.parametrize("mlp", ["mlp", "mlp.shared_experts"])
def test_dense_and_shared_mlps_unstack_gate_and_up(mlp: str) -> None:
    stack = torch.randn(2, 3, 4)
    views = dict(hf_views(f"model.layers.0.{mlp}.gate_up_proj", stack))
    assert list(views) == [f"model.layers.0.{mlp}.{part}_proj.weight" for part in ("gate", "up")]
    assert torch.equal(views[f"model.layers.0.{mlp}.up_proj.weight"], stack[1])


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        f"{LAYER}.gate.weight",
        f"{LAYER}.shared_experts.down_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    ],
)
def test_single_matrices_keep_their_names(name: str) -> None:
    tensor = torch.randn(2, 3)
    assert [(n, t is tensor) for n, t in hf_views(name, tensor)] == [(name, True)]


def test_views_share_memory() -> None:
    """Loading a checkpoint and decaying a weight write through them."""
    stack = torch.zeros(2, 2, 3, 4)
    for _, view in hf_views(f"{LAYER}.experts.gate_up_proj", stack):
        view.fill_(1.0)
    assert bool((stack == 1.0).all())
