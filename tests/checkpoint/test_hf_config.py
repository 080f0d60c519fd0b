"""config.json of the family <-> ModelConfig."""

from typing import Any

import pytest

from kimi_pretrain.checkpoint.hf_config import hf_config, model_config, mtp_layers
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, RopeScalingConfig

K2: dict[str, Any] = {  # the released file's keys and values, 128k variant
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def without(*keys: str, **changed: Any) -> dict[str, Any]:
    return {key: value for key, value in (K2 | changed).items() if key not in keys}


def test_the_released_file() -> None:
    """Catches a key that is dropped or read under another name."""
    cfg = model_config(K2, "k2")
    assert cfg == ModelConfig(
        name="k2",
        vocab_size=163840,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=131072,
        rope_theta=50000.0,
        rope_scaling=RopeScalingConfig(
            "yarn", 32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
        ),
        intermediate_size=18432,
        first_k_dense_replace=1,
        moe_intermediate_size=2048,
        n_routed_experts=384,
        num_experts_per_tok=8,
        bos_token_id=163584,
        eos_token_id=163585,
    )


@pytest.mark.parametrize(
    "raw",
    [
        K2,
        without(q_lora_rank=None, rope_scaling=None, model_type="deepseek_v3", rms_norm_eps=1e-5),
        without(n_group=8, topk_group=4, n_routed_experts=256, routed_scaling_factor=2.5),
    ],
)
def test_export_reads_back(raw: dict[str, Any]) -> None:
    """Catches a value lost on export; dial and name are ours and stay out of the file."""
    cfg = model_config(raw, "any")
    written = hf_config(cfg, "bfloat16")
    assert model_config(written, "any") == cfg
    assert written["model_type"] == "deepseek_v3"
    assert "auto_map" not in written
    assert not {"name", "dial"} & written.keys()
    assert set(raw) - {"auto_map", "quantization_config", "pretraining_tp"} <= set(written)


def test_number_of_key_value_heads_is_written() -> None:
    """Catches its absence, which transformers reads as 128 whatever the model has."""
    assert hf_config(model_config(K2, "k2"), "float32")["num_key_value_heads"] == 64
    assert model_config(without("num_key_value_heads"), "k2").num_attention_heads == 64
    with pytest.raises(ConfigError, match=r"num_key_value_heads: got 8; .*try 64"):
        model_config(without(num_key_value_heads=8), "k2")


def test_rope_parameters_of_transformers_5() -> None:
    """Catches YaRN, and with it mscale in the softmax scale, lost in the newer spelling."""
    settings = K2["rope_scaling"] | {"rope_theta": 50000.0, "rope_type": "yarn"}
    raw = without("rope_scaling", "rope_theta", rope_parameters=settings)
    assert model_config(raw, "k2") == model_config(K2, "k2")
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    cfg = model_config(without("rope_scaling", "rope_theta", rope_parameters=plain), "k2")
    assert cfg.rope_scaling is None
    assert cfg.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("rope_interleave", False),
        ("scoring_func", "softmax"),
        ("topk_method", "group_limited_greedy"),
        ("moe_layer_freq", 2),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("hidden_size", "7168"),
        ("hidden_size", 7168.0),
        ("norm_topk_prob", 1),
        ("n_group", None),
        ("num_hidden_layers", True),
    ],
)
def test_values_that_would_give_other_logits_are_refused(key: str, value: object) -> None:
    """Catches a model that loads and computes something else than its authors' code."""
    with pytest.raises(ConfigError, match=rf"config\.json: {key}: got .*; .*; try ") as error:
        model_config(without(**{key: value}), "k2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["rope_theta", "routed_scaling_factor", "first_k_dense_replace", "n_group", "norm_topk_prob"],
)
def test_absent_keys_are_not_guessed(key: str) -> None:
    """Catches K2's value taken where transformers would take DeepSeek's."""
    with pytest.raises(ConfigError, match=rf"config\.json: {key}: got None"):
        model_config(without(key), "k2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("type", "linear"),
        ("attention_factor", 1.3),
        ("truncate", False),
        ("long_factor", [1.0]),
        ("factor", "32"),
    ],
)
def test_scalings_that_are_not_plain_yarn_are_refused(key: str, value: object) -> None:
    """Catches a RoPE scaling silently read as another one."""
    raw = without(rope_scaling=K2["rope_scaling"] | {key: value})
    with pytest.raises(ConfigError, match=rf"rope_scaling\.{key}"):
        model_config(raw, "k2")


def test_yarn_without_its_factor() -> None:
    """Catches a factor guessed from max_position_embeddings."""
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor: got None"):
        model_config(without(rope_scaling={"type": "yarn"}), "k2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "compressed-tensors"),
        ("fmt", "e5m2"),
        ("weight_block_size", [64, 64]),
    ],
)
def test_other_quantisations_are_refused(key: str, value: object) -> None:
    """Catches packed integers or other blocks multiplied as if they were 128 x 128 FP8."""
    raw = without(quantization_config=K2["quantization_config"] | {key: value})
    with pytest.raises(ConfigError, match=rf"quantization_config\.{key}"):
        model_config(raw, "k2")


def test_small_differences_between_files() -> None:
    """Catches an integer theta, several end tokens or absent harmless keys taken for errors."""
    raw = without("aux_loss_alpha", "scoring_func", "topk_method", rope_theta=50000)
    cfg = model_config(raw | {"eos_token_id": [163586, 163585]}, "k2")
    assert cfg.rope_theta == 50000.0
    assert cfg.eos_token_id == 163586
    assert mtp_layers(without(num_nextn_predict_layers=1)) == 1
    assert mtp_layers(without("num_nextn_predict_layers")) == 0
    with pytest.raises(ConfigError, match="num_nextn_predict_layers: got '1'"):
        mtp_layers(without(num_nextn_predict_layers="1"))
