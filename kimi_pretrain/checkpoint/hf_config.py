"""Hugging Face ``config.json`` of the DeepSeek-V3 family <-> ``ModelConfig``. Pure.

``ModelConfig`` carries Hugging Face's key names, so most keys pass through. What is
written out here are the differences: two spellings of the RoPE settings (``rope_theta``
with ``rope_scaling``, and transformers 5's ``rope_parameters``), keys whose absence means
something else to transformers than to us, and keys of which this package implements one
value only.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from kimi_pretrain.checkpoint.fp8_blocks import BLOCK
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, RopeScalingConfig

MODEL_TYPES = ("deepseek_v3", "kimi_k2")

# The one value of each key that the model here implements. Absent means that value too.
_ONLY: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# Keys that may be absent because no logit depends on them; our own default stands in.
# Any other absent key is an error: transformers' default is not K2's (theta 10,000,
# 3 dense layers, factor 2.5, 8 groups), and a silent pick changes the logits.
_OPTIONAL = {"aux_loss_alpha", "initializer_range", "bos_token_id", "eos_token_id"}
# Keys that `model_config` computes by itself.
_OWN = {"name", "dial", "rope_theta", "rope_scaling", "num_nextn_predict_layers"}


def model_config(raw: Mapping[str, Any], name: str) -> ModelConfig:
    """Read a parsed ``config.json``.

    Args:
        raw: the JSON object.
        name: becomes ``ModelConfig.name`` (the file has none).

    Multi-token-prediction layers (``num_nextn_predict_layers``) come back as 0: they are
    not part of the model here. ``num_key_value_heads`` means nothing to MLA and is checked,
    not read (absent, transformers takes 128 whatever the number of heads is).

    Raises:
        ConfigError: another model type, an absent or ill-typed key, or a value that this
            package does not implement; the message names the key.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise _refusal(
            "model_type", model_type, f"it is one of {', '.join(MODEL_TYPES)}", MODEL_TYPES[0]
        )
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise _refusal(key, raw[key], "only one value is implemented", repr(only))
    values: dict[str, Any] = {"name": name, "num_nextn_predict_layers": 0, **_rope(raw)}
    hints = get_type_hints(ModelConfig)
    for field in fields(ModelConfig):
        key = field.name
        if key in _OWN or (key in {*_ONLY, *_OPTIONAL} and raw.get(key) is None):
            continue
        value = raw.get(key)
        if key not in raw:
            raise _refusal(key, None, "it must be present, since defaults differ", "adding it")
        if key == "eos_token_id" and isinstance(value, list) and value:
            value = value[0]  # chat models list several ends; the first ends a document
        values[key] = _typed(key, value, hints[key])
    heads = values["num_attention_heads"]
    if raw.get("num_key_value_heads", heads) not in (heads, None):
        rule = f"MLA has as many key-value heads as heads ({heads})"
        raise _refusal("num_key_value_heads", raw["num_key_value_heads"], rule, str(heads))
    _check_quantization(raw.get("quantization_config"))
    return ModelConfig(**values)


def mtp_layers(raw: Mapping[str, Any]) -> int:
    """Multi-token-prediction layers that the checkpoint may hold after the model's own."""
    count = raw.get("num_nextn_predict_layers")
    return 0 if count is None else int(_typed("num_nextn_predict_layers", count, int))


def hf_config(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model, with the keys of the released ones.

    Args:
        cfg: the model.
        dtype: torch's name of the parameters' type, e.g. ``bfloat16``.

    The model type is ``deepseek_v3``, which every engine knows; ``kimi_k2`` needs remote
    code. ``num_key_value_heads`` is always written.
    """
    scaling = cfg.rope_scaling
    own = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in ("name", "dial")}
    return own | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_dropout": 0.0,
        "model_type": "deepseek_v3",
        "moe_layer_freq": 1,
        "num_key_value_heads": cfg.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "rope_scaling": scaling
        and {field.name: getattr(scaling, field.name) for field in fields(scaling)},
        "seq_aux": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` from either spelling."""
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", None) or raw.get("rope_theta")
    if theta is None:
        raise _refusal("rope_theta", None, "it must be present, since defaults differ", "50000.0")
    values: dict[str, Any] = {"rope_theta": _typed("rope_theta", theta, float)}
    kinds = {settings.pop(key, None) for key in ("type", "rope_type")} - {None}
    if not settings and kinds <= {"default"}:
        return values
    if kinds != {"yarn"}:
        raise _refusal("rope_scaling.type", sorted(kinds), "the only RoPE scaling is YaRN", "yarn")
    for key, only in (("attention_factor", None), ("truncate", True)):
        value = settings.pop(key, only)
        if value != only:
            rule = "only its default is implemented"
            raise _refusal(f"rope_scaling.{key}", value, rule, f"{only}")
    hints = get_type_hints(RopeScalingConfig)
    for key in ("factor", "original_max_position_embeddings"):
        if key not in settings:
            raise _refusal(f"rope_scaling.{key}", None, "YaRN needs it", "adding it")
    for key in settings:
        if key not in hints:
            rule = f"known keys are {', '.join(sorted(hints))}"
            raise _refusal(f"rope_scaling.{key}", settings[key], rule, "removing it")
    typed = {
        key: _typed(f"rope_scaling.{key}", value, hints[key]) for key, value in settings.items()
    }
    values["rope_scaling"] = RopeScalingConfig(**typed)
    return values


def _check_quantization(settings: Mapping[str, Any] | None) -> None:
    if settings is None:
        return
    for key, only in (
        ("quant_method", "fp8"),
        ("fmt", "e4m3"),
        ("weight_block_size", [BLOCK, BLOCK]),
    ):
        if settings.get(key, only) != only:
            rule = "the quantised weights read here are FP8 E4M3 with 128 x 128 block scales"
            raise _refusal(f"quantization_config.{key}", settings[key], rule, repr(only))


def _typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the schema's type; an integer may stand for a float, nothing else bends."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in kinds:
        return value
    names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
    raise _refusal(key, value, f"its type is {names}", f"a value of type {names}")


def _refusal(key: str, value: object, rule: str, fix: str) -> ConfigError:
    return ConfigError(f"config.json: {key}", value, rule, fix)
