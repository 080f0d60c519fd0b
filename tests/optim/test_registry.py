import pytest
import torch
from torch import nn

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, OptimizerConfig
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.registry import build_optimizer

MODEL = ModelConfig(qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)


def named(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    return [
        ("model.embed_tokens.weight", nn.Parameter(torch.randn(8, 4, dtype=dtype))),
        ("model.layers.0.mlp.down_proj.weight", nn.Parameter(torch.randn(4, 6, dtype=dtype))),
        ("model.norm.weight", nn.Parameter(torch.ones(4, dtype=dtype))),
    ]


def test_every_setting_of_the_configuration_reaches_the_optimizer() -> None:
    """Catches a setting that is read, shown in the saved configuration, and never used."""
    cfg = OptimizerConfig(
        lr=3e-3,
        weight_decay=0.02,
        momentum=0.9,
        nesterov=False,
        ns_coefficients="polar_express",
        update_rms=0.3,
        adam_betas=(0.8, 0.85),
        adam_eps=1e-6,
        qk_clip_threshold=30.0,
    )
    optimizer = build_optimizer(cfg, MODEL, named())
    group = optimizer.param_groups[0]
    keys = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "update_rms")
    assert [group[key] for key in keys] == [3e-3, 0.02, 0.9, False, "polar_express", 0.3]
    assert (group["betas"], group["eps"]) == ((0.8, 0.85), 1e-6)
    assert optimizer.qk_clip_threshold == 30.0
    assert optimizer.qk_head_dims is not None
    assert vars(optimizer.qk_head_dims) == {"nope": 4, "rope": 2, "v": 3}


def test_adamw_leaves_no_parameter_to_muon() -> None:
    kinds = {
        name: {kind for _, kind, _ in optimizer.named_state()}
        for name in ("adamw", "muonclip")
        for optimizer in [build_optimizer(OptimizerConfig(name=name), MODEL, named())]
    }
    assert kinds == {
        "adamw": {"exp_avg", "exp_avg_sq"},
        "muonclip": {"momentum", "exp_avg", "exp_avg_sq"},
    }


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, resolve("auto")),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_newton_schulz_is_fp64_in_fp64_and_never_emulated(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    """Catches bf16 inside an fp64 run, and an fp32 run on an old CPU at a tenth of its speed."""
    optimizer = build_optimizer(OptimizerConfig(), MODEL, named(dtype))
    assert optimizer.param_groups[0]["ns_dtype"] == expected


def test_frozen_parameters_are_left_out() -> None:
    parameters = named()
    parameters[1][1].requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(), MODEL, parameters)
    assert "model.layers.0.mlp.down_proj.weight" not in optimizer.names.values()


def test_an_unknown_name_is_one_line_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name.*sgd.*muonclip, adamw"):
        build_optimizer(OptimizerConfig(name="sgd"), MODEL, named())
