"""The dial: K2's own widths at 64, the family's shape below."""

from dataclasses import asdict

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.family import widths
from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.config.validate import validate_model


def test_dial_64_is_kimi_k2() -> None:
    """Catches a formula that drifts from the released configuration at full size."""
    k2 = compose(["model=k2"]).model
    assert asdict(widths(64)) == {name: getattr(k2, name) for name in asdict(widths(64))}


@pytest.mark.parametrize("dial", range(1, 65))
def test_every_dial_keeps_the_shape_of_the_family(dial: int) -> None:
    """Catches a dial that rounds to a model the rules refuse or that loses its sparsity."""
    member = widths(dial)
    sizes = {"vocab_size": 2048, "max_position_embeddings": 4096}
    validate_model(ModelConfig(name="member", dial=dial, **sizes, **asdict(member)))
    assert member.n_routed_experts == 48 * member.num_experts_per_tok
    assert member.intermediate_size == member.moe_intermediate_size * (
        member.num_experts_per_tok + 1
    )
    assert member.q_lora_rank == 3 * member.kv_lora_rank
    assert 2 * member.qk_rope_head_dim == member.qk_nope_head_dim == member.v_head_dim
    assert member.hidden_size % 32 == 0


def test_nano_is_what_the_documentation_says() -> None:
    """Catches a silent change of the default run's model."""
    assert asdict(widths(3)) == {
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "q_lora_rank": 72,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 12,
        "v_head_dim": 24,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "n_routed_experts": 96,
        "num_experts_per_tok": 2,
    }


@pytest.mark.parametrize(("dial", "nearest"), [(0, 1), (-3, 1), (65, 64)])
def test_a_dial_out_of_range_names_the_nearest(dial: int, nearest: int) -> None:
    """Catches a dial beyond K2 that would extrapolate formulas nobody has tried."""
    with pytest.raises(ConfigError, match=rf"model\.dial: got {dial};.*try model\.dial={nearest}$"):
        compose([f"model.dial={dial}"])


def test_widths_set_by_hand_win_over_the_dial() -> None:
    """Catches a resolver that overwrites what the user asked for."""
    model = compose(["model=k2_nano", "model.n_routed_experts=8"]).model
    assert (model.n_routed_experts, model.hidden_size) == (8, 64)
