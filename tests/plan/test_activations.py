"""What a layer is planned to keep against what a real layer keeps."""

from dataclasses import replace

import pytest
import torch

from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.config import compose
from kimi_pretrain.config.activation import GRADIENTS, policies
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.tape import ChunkTape, forward_steps, straight
from kimi_pretrain.ops import attention as attention_ops
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.plan.activations import Setting, layer_kept, stage_kept
from kimi_pretrain.plan.operations import (
    ATTENTION_KEPT_ELEMENTS,
    ATTENTION_MAX_ROWS,
    ATTENTION_MIN_ROWS,
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


POLICIES = {
    "none": ["activation=none"],
    "k2": ["activation=k2"],
    "some": ["activation=none", "activation.policy=custom", "+activation.tags.norm_out=recompute"],
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weights", ["after_combine", "before_down"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_real_layer_keeps_what_is_planned(layer: int, weights: str, policy: str) -> None:
    """Catches a tensor that an operation saves and the plan forgot, or the other way round."""
    config = wide(f"parallel.router_weights={weights}", *POLICIES[policy])
    torch.manual_seed(0)
    model = replace(config.model, first_k_dense_replace=2 - layer)
    chunk = Chunk(model, range(1, 2), torch.bfloat16)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    record = StepRecord.for_model(model, tau=1e9, aux_scale=1.0)
    shared = Microbatch.build(model, LENGTH, torch.bfloat16, torch.device("cpu"), None, record)
    tapes: list[ChunkTape] = []
    dispatcher = LocalDispatcher(weights == "before_down")
    x = torch.randn(1, LENGTH, model.hidden_size, dtype=torch.bfloat16)
    activations = Activations(policies(config.activation))
    straight(forward_steps(chunk, x, shared, dispatcher, tapes.append, activations=activations))
    real = tapes[0].saved.device_bytes()
    planned = layer_kept(replace(Setting.of(config, 1), model=model), moe=layer == 1)
    assert set(real) == set(planned)
    for tag, size in planned.items():
        # An expert's rows may be padded to a neighbour's, and have their places then.
        loose = 0.05 if "expert" in tag or tag in ("swiglu_in", "router") else 0.0
        extra = {"route": 8 * 2, "router": 4 * 2 + 8 * 4}.get(tag, 0)
        assert planned[tag] * LENGTH <= real[tag] <= (size * (1 + loose) + extra) * LENGTH, tag
    assert sum(planned.values()) * LENGTH == pytest.approx(sum(real.values()), rel=0.03)


def test_the_constants_are_the_operations() -> None:
    """Catches a threshold that was changed in the operation only."""
    assert attention_ops._KEPT_ELEMENTS == ATTENTION_KEPT_ELEMENTS
    assert attention_ops._MIN_ROWS == ATTENTION_MIN_ROWS
    assert attention_ops._MAX_ROWS == ATTENTION_MAX_ROWS


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
    assert set(few) == {
        "norm_in",
        "attn_out",
        "router",
        "route",
        "expert_up_in",
        "swiglu_in",
    }
    assert few["expert_up_in"] == pytest.approx(8 * 7168 * (1 + 4 / 128))
    assert few["swiglu_in"] == pytest.approx(9 * 2 * 2048 * (1 + 4 / 128))
    assert sum(few.values()) < 0.35 * sum(everything.values())


def test_the_last_stage_keeps_no_gradient_of_the_head() -> None:
    """Catches 2.35 GB a microbatch that no run keeps."""
    kept, less = (stage_kept(k2("k2"), layers) for layers in (range(60, 61), range(59, 60)))
    assert kept.stays["head"] == pytest.approx(4096 * 12)  # a label and a log-sum-exp a token
    assert kept.again["norm_out"] - less.again["norm_out"] == pytest.approx(4096 * 7168 * 2)
    assert "tokens" in stage_kept(k2("k2"), range(4)).stays


def test_weight_gradients_wait_with_all_outputs() -> None:
    """Catches a dense layer counted as an expert layer."""
    moe, dense = (
        stage_kept(k2("none"), layers, GRADIENTS).backward(False, True).waits.gradients
        for layers in (range(5, 6), range(1))
    )
    shared = 1536 + 64 * 192 + 576 + 64 * 256 + 7168
    assert moe == 4096 * (2 * (shared + 9 * (4096 + 7168)) + 4 * 384)
    assert dense == 4096 * 2 * (shared + 2 * 18432 + 7168)


def test_an_unknown_policy_is_refused() -> None:
    """Catches a plan of everything kept for a misspelt policy."""
    with pytest.raises(ConfigError, match=r"activation\.policy: got 'k3'; .*; try .*=k2"):
        Setting.of(compose(["activation.policy=k3"]), 1)
