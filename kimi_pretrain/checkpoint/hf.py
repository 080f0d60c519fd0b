"""Import and export of Hugging Face checkpoints of the DeepSeek-V3 / Kimi K2 family.

Tensors travel one at a time between the files and the model's stacked parameters, through
the views of ``model.names.hf_views``; a second copy of the model never exists. No pickle
is read on any path.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kimi_pretrain.checkpoint.fp8_blocks import dequantise, scale_shape
from kimi_pretrain.checkpoint.hf_config import hf_config, model_config, mtp_layers
from kimi_pretrain.checkpoint.shards import WeightFiles, read_json, write_json, write_weights
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.validate import validate_model
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM

_SCALE = "_scale_inv"  # q_b_proj.weight_scale_inv belongs to q_b_proj.weight
_FP8 = "F8_E4M3"  # types as safetensors spells them
_FLOATS = ("F64", "F32", "F16", "BF16")
# Old checkpoints of the family carry the frequencies of each layer; they follow from config.json.
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def from_hf(directory: str | Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Read a checkpoint directory of model type ``deepseek_v3`` or ``kimi_k2``.

    Args:
        directory: holds ``config.json`` and ``model.safetensors`` or a sharded index.
        dtype: of the parameters; stored values are converted. Released FP8 weights are
            multiplied by their block scales. The router's selection bias stays float32
            (float64 in a float64 model).

    Multi-token-prediction layers, if the configuration declares them, are left out with a
    warning that counts their tensors.

    Raises:
        ConfigError: a directory, file, key or tensor that cannot be used; one line with
            its name, before any parameter is allocated where names and shapes tell.
    """
    directory = Path(directory)
    if not directory.is_dir():
        rule = "a checkpoint is a directory with config.json and safetensors"
        raise ConfigError("Hugging Face checkpoint", str(directory), rule, "an existing directory")
    raw = read_json(directory / "config.json")
    cfg = model_config(raw, directory.resolve().name)
    validate_model(cfg)
    model = from_config(cfg, dtype=dtype, device="meta")
    with WeightFiles(directory) as files:
        names = _weights_to_read(files, cfg.num_hidden_layers, mtp_layers(raw))
        _check_names(names, _targets(model), directory)
        _check_headers(files, names, _targets(model))
        model.to_empty(device="cpu")
        targets = _targets(model)
        with torch.no_grad():
            for name in names:  # in file order: sequential reads
                targets[name].copy_(_read(files, name))
    return model


def to_hf(model: CausalLM, directory: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model as a Hugging Face checkpoint that transformers and engines read.

    Args:
        model: any dtype; tensors are written as they are.
        directory: created if absent. Weights of an earlier export in it are replaced,
            other files (a tokenizer, say) stay.
        shard_bytes: a file grows to at most this size (or one tensor).

    Raises:
        ConfigError: the model holds a part of the experts only, as on a rank of several.
    """
    if len(model.experts) != model.config.n_routed_experts:
        held = f"{model.experts.start} to {model.experts.stop - 1}"
        rule = f"an export needs all {model.config.n_routed_experts} experts"
        raise ConfigError("experts of the model", held, rule, "kimi-pretrain ckpt export RUN DIR")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, _targets(model), shard_bytes)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(directory / "config.json", hf_config(model.config, dtype))


def _targets(model: CausalLM) -> dict[str, Tensor]:
    """Every weight of the model by its Hugging Face name, as views."""
    return dict(model.hf_named_parameters()) | dict(model.hf_named_buffers())


def _weights_to_read(files: WeightFiles, layers: int, mtp: int) -> list[str]:
    """Names in file order, without what is left out by design and without FP8 scales."""
    names: list[str] = []
    left_out = 0
    for name in files:
        layer = _LAYER.match(name)
        if layer and layers <= int(layer[1]) < layers + mtp:
            left_out += 1
        elif name.endswith(_SCALE) and name.removesuffix(_SCALE) in files:
            continue  # read beside its weight
        elif not _FREQUENCIES.fullmatch(name):
            names.append(name)
    if left_out:
        warnings.warn(
            f"{files.directory}: {left_out} tensors of {mtp} multi-token-prediction layer(s) "
            f"(model.layers.{layers} and up) are left out; the model has {layers} layers",
            stacklevel=3,
        )
    return names


def _check_names(names: list[str], targets: Mapping[str, Tensor], directory: Path) -> None:
    """The files hold the model's weights, all of them and nothing else."""
    present = set(names)
    for wrong, state, fix in (
        ([name for name in targets if name not in present], "missing", "the complete checkpoint"),
        ([name for name in names if name not in targets], "unexpected", "its own config.json"),
    ):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            rule = f"config.json in {directory} determines every tensor's name"
            raise ConfigError(f"tensor {wrong[0]}", state + more, rule, fix)


def _check_headers(files: WeightFiles, names: list[str], targets: Mapping[str, Tensor]) -> None:
    """Shapes and types fit, by the files' headers alone: no tensor is read yet."""
    for name in names:
        what = f"tensor {name} in {files.home(name)}"
        shape, kind = files.shape(name), files.kind(name)
        expected = tuple(targets[name].shape)
        if shape != expected:
            rule = f"config.json says {list(expected)}"
            raise ConfigError(f"{what}: shape", list(shape), rule, "the config.json it came with")
        scaled = name + _SCALE in files
        if scaled != (kind == _FP8):
            rule = f"a weight is {_FP8} exactly if {name + _SCALE} is there"
            raise ConfigError(f"{what}: type", kind, rule, "the complete checkpoint")
        readable = (*_FLOATS, _FP8) if len(shape) == 2 else _FLOATS
        if kind not in readable:
            rule = f"readable types are {', '.join(readable)}"
            raise ConfigError(f"{what}: type", kind, rule, "a bf16 copy of the checkpoint")
        if scaled:
            found = files.kind(name + _SCALE), list(files.shape(name + _SCALE))
            rows, columns = scale_shape(shape)
            if found != ("F32", [rows, columns]):
                rule = f"one F32 scale a 128 x 128 block: [{rows}, {columns}]"
                what = f"tensor {name + _SCALE} in {files.home(name + _SCALE)}"
                raise ConfigError(what, found, rule, "the complete checkpoint")


def _read(files: WeightFiles, name: str) -> Tensor:
    stored = files.read(name)
    if files.kind(name) == _FP8:
        return dequantise(stored, files.read(name + _SCALE))
    return stored
