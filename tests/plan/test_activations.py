"""What a layer is planned to keep against what a real layer keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.tape import ChunkTape, forward_steps, straight
from kimi_pretrain.ops import attention as attention_ops
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.plan.activations import (
    ATTENTION_KEPT_ELEMENTS,
    ATTENTION_MIN_ROWS,
    Setting,
    gradients_until_w,
    layer_kept,
    stage_kept,
)

LENGTH = 256
# Wide enough that rows decide, and not what a token or an expert has one number of.
WIDE = [
    "model.hidden_size=512",
    "model.moe_intermediate_size=256",
    "model.intermediate_size=1024",
    "model.n_routed_experts=4",
    "model.num_experts_per_tok=2",
    f"data.sequence_length={LENGTH}",
]


def wide(*overrides: str) -> Config:
    return compose([*WIDE, *overrides])


@pytest.mark.parametrize("weights", ["after_combine", "before_down"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_real_layer_keeps_what_is_planned(layer: int, weights: str) -> None:
    """Catches a tensor that an operation saves and the plan forgot, or the other way round."""
    config = wide(f"parallel.router_weights={weights}")
    torch.manual_seed(0)
    first = replace(config.model, first_k_dense_replace=2 - layer)
    chunk = Chunk(first, range(1, 2), torch.bfloat16)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    record = StepRecord.for_model(first, tau=1e9, aux_scale=1.0)
    shared = Microbatch.build(first, LENGTH, torch.bfloat16, torch.device("cpu"), None, record)
    own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    own |= {shared.cos.untyped_storage().data_ptr(), shared.sin.untyped_storage().data_ptr()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    tapes: list[ChunkTape] = []
    dispatcher = LocalDispatcher(weights == "before_down")
    x = torch.randn(1, LENGTH, first.hidden_size, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        straight(forward_steps(chunk, x, shared, dispatcher, tapes.append))
    for tape in tapes[0].layers:
        for graph in (tape.attend, tape.expert, tape.combine):
            for leaf in graph.leaves if graph is not None else ():
                if leaf is not None:
                    pack(leaf)
    setting = replace(Setting.of(config, 1), model=first)
    planned = sum(layer_kept(setting, moe=layer == 1).values()) * LENGTH
    real = sum(size for size, _ in kept.values())
    assert planned == pytest.approx(real, rel=0.05)


def test_the_constants_are_the_operations() -> None:
    """Catches a threshold that was changed in the operation only."""
    assert attention_ops._KEPT_ELEMENTS == ATTENTION_KEPT_ELEMENTS
    assert attention_ops._MIN_ROWS == ATTENTION_MIN_ROWS


def k2(policy: str) -> Setting:
    config = compose(
        [
            "model=k2",
            "data.sequence_length=4096",
            f"activation={policy}",
            "parallel.ep=16",
            "parallel.dp=16",
            "parallel.router_weights=before_down",
        ]
    )
    return Setting.of(config, 1)


def test_k2s_policy_keeps_a_third() -> None:
    """Catches a tag that is recomputed and counted all the same: q, k, v and experts' outputs."""
    everything, few = layer_kept(k2("none"), moe=True), layer_kept(k2("k2"), moe=True)
    assert set(few) == {"norm_in", "attn_out", "router", "expert_up_in", "swiglu_in"}
    assert few["expert_up_in"] == pytest.approx(8 * 7168 * (1 + 4 / 128))
    assert few["swiglu_in"] == pytest.approx(9 * 2 * 2048 * (1 + 4 / 128))
    assert sum(few.values()) < 0.3 * sum(everything.values())


def test_the_last_stage_keeps_the_heads_gradient() -> None:
    """Catches 2.35 GB a microbatch that the loss computes in its forward and keeps."""
    kept = stage_kept(k2("k2"), range(60, 61))
    assert kept["head"] == pytest.approx(163_840 * 7168 * 2 + 2 * 4096 * 7168 * 2)
    assert "tokens" in stage_kept(k2("k2"), range(4))


def test_weight_gradients_wait_with_all_outputs() -> None:
    """Catches a dense layer counted as an expert layer."""
    moe = gradients_until_w(k2("none"), range(5, 6))
    dense = gradients_until_w(k2("none"), range(1))
    shared = 1536 + 64 * 192 + 576 + 64 * 256 + 7168
    assert moe == 4096 * (2 * (shared + 9 * (4096 + 7168)) + 4 * 384)
    assert dense == 4096 * 2 * (shared + 2 * 18432 + 7168)


def test_an_unknown_policy_is_refused() -> None:
    """Catches a plan of everything kept for a misspelt policy."""
    with pytest.raises(ConfigError, match=r"activation\.policy: got 'k3'; .*; try .*=k2"):
        Setting.of(compose(["activation.policy=k3"]), 1)
