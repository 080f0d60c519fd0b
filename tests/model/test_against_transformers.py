"""The model against transformers' DeepseekV3ForCausalLM: logits and every gradient.

Weights go through a checkpoint that transformers wrote. In float32 the bound is 1e-4, in
float64 1e-9 relative to a tensor's largest element; the float64 run is what tells a wrong
epsilon or a rounded table from noise.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.checkpoint.hf import from_hf
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.router import Router
from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.ops.native import library
from kimi_pretrain.ops.registry import kernels_for
from tests.model import peer

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "q_lora": ({}, "small"),
    "no q_lora": ({"q_lora_rank": None}, "small"),
    "YaRN factor 32": ({"rope_scaling": peer.yarn()}, "small"),
    "YaRN mscale 0.5, all dim 1": ({"rope_scaling": peer.yarn(mscale=0.5)}, "small"),
    "YaRN mscale 1, all dim 0.5": ({"rope_scaling": peer.yarn(mscale_all_dim=0.5)}, "small"),
    "two dense layers": ({"first_k_dense_replace": 2}, "small"),
    "strong biases": ({}, "strong"),
    "negative biases": ({}, "negative"),
    "top 8 of 48": ({"n_routed_experts": 48, "num_experts_per_tok": 8}, "small"),
    "groups": (
        {"n_routed_experts": 48, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 3},
        "small",
    ),
    "groups, negative biases": ({"n_group": 4, "topk_group": 2}, "negative"),
    "two shared experts": ({"n_shared_experts": 2}, "small"),
    "unnormalised weights": ({"norm_topk_prob": False}, "small"),
    # far above 1e-6, so that the inner norms of q_a and kv_a must not follow it
    "norm epsilon 0.01": ({"rms_norm_eps": 0.01}, "small"),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    return CASES[request.param]


def compare(
    case: tuple[dict[str, Any], str],
    dtype: torch.dtype,
    tolerance: float,
    directory: Path,
    kernels: Kernels = REFERENCE,
) -> None:
    reference = peer.build_peer(*case, dtype=dtype)
    read = from_hf(peer.save(reference, directory), dtype)
    model = from_config(read.config, dtype, kernels=kernels)
    model.load_state_dict(read.state_dict())
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (2, 41), generator=generator)
    labels = torch.randint(0, 97, (2, 41), generator=generator)
    logits = reference(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    ours = model.loss(tokens, labels)
    ours.backward()
    with torch.no_grad():
        assert (model(tokens) - logits).abs().max().item() < tolerance
        worst = worst_element(
            {"logits": model(tokens), "loss": ours, **dict(model.hf_named_gradients())},
            {"logits": logits, "loss": loss, **dict(peer.hf_gradients(reference))},
        )
    assert worst[0] < tolerance, worst


def worst_element(
    got: dict[str, Tensor], want: dict[str, Tensor]
) -> tuple[float, str, float, float]:
    """(relative error, name, our value, theirs) of the worst element over all tensors."""
    assert got.keys() == want.keys()
    worst = (-1.0, "", 0.0, 0.0)
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype
        assert got[name].shape == expected.shape
        error = (got[name] - expected).abs().flatten()
        at = int(error.argmax())
        largest = expected.abs().max().item()  # 0 for an expert without tokens
        relative = error[at].item() / largest if largest else error[at].item()
        if relative > worst[0]:
            worst = (relative, name, got[name].flatten()[at].item(), expected.flatten()[at].item())
    return worst


def test_float32(case: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    """Catches any difference of the forward or backward from the family's reference code."""
    compare(case, torch.float32, 1e-4, tmp_path)


def test_float32_with_the_kernels_of_a_run(tmp_path: Path) -> None:
    """Catches a native kernel that is right by itself and wrong where the model calls it: a run
    takes kernels=auto, everything else here plain torch."""
    if library.missing() is not None:
        pytest.skip(f"no native kernels: {library.missing()}")
    kernels = kernels_for("auto", "cpu", torch.float32)
    assert kernels.swiglu is not REFERENCE.swiglu
    compare(CASES["top 8 of 48"], torch.float32, 1e-4, tmp_path, kernels)


def test_float64(
    case: tuple[dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what float32 hides: an epsilon, a table or a reduction in float32."""
    peer.compute_in_double(monkeypatch)
    compare(case, torch.float64, 1e-9, tmp_path)


@pytest.mark.parametrize("biases", ["small", "strong", "negative"])
@pytest.mark.parametrize("level", [0.0, -60.0])
def test_router_of_a_bf16_model(biases: str, level: float, tmp_path: Path) -> None:
    """Catches a router product or bias in bf16, and a normaliser without its 1e-20.

    At logits near -60 the scores sum to about 1e-26, so that 1e-20 decides the weights.
    """
    changes = {"n_routed_experts": 48, "num_experts_per_tok": 8, "n_group": 4, "topk_group": 2}
    reference = peer.build_peer(changes, biases, torch.bfloat16)
    gate = reference.model.layers[1].mlp.gate
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.float() * 1.003
    hidden = torch.randn(1, 300, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        gate.weight[:, 0] = level
        hidden[..., 0] = 1.0
    model = from_hf(peer.save(reference, tmp_path), torch.bfloat16)
    router = model.get_submodule("model.layers.1.mlp.gate")
    assert isinstance(router, Router)
    _, weights, indices = gate(hidden)
    ours = router(hidden)
    assert ours.weights.dtype == torch.float32
    dense = torch.zeros(300, 48).scatter(1, indices, weights)
    torch.testing.assert_close(
        torch.zeros(300, 48).scatter(1, ours.indices, ours.weights), dense, rtol=1e-5, atol=0.0
    )
