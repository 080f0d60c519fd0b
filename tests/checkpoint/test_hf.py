"""Import and export of Hugging Face checkpoints, against transformers."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import kimi_pretrain
from kimi_pretrain.checkpoint import shards
from kimi_pretrain.checkpoint.hf import from_hf, to_hf
from kimi_pretrain.config.errors import ConfigError
from tests.checkpoint.hf_files import assert_same, edit, edit_config, stored, weights_of
from tests.model import peer

TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def written_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with YaRN, as transformers 5 writes it. Read only."""
    model = peer.build_peer({"rope_scaling": peer.yarn()})
    return peer.save(model, tmp_path_factory.mktemp("theirs"), max_shard_size="60KB")


@pytest.fixture
def checkpoint(written_by_transformers: Path, tmp_path: Path) -> Path:
    """A copy of it as one file, to be changed by a test."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    config = (written_by_transformers / "config.json").read_text()
    (directory / "config.json").write_text(config)
    save_file(stored(written_by_transformers), directory / "model.safetensors")
    return directory


# Between transformers and us


def test_reading_what_transformers_wrote(written_by_transformers: Path) -> None:
    """Catches gate and up exchanged, experts out of order, a lost router bias."""
    assert (written_by_transformers / shards.INDEX).exists()
    model = from_hf(written_by_transformers)
    assert_same(weights_of(model), stored(written_by_transformers))
    theirs = peer.load(written_by_transformers)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=0.0, atol=1e-4)


def test_the_stacks_hold_the_gate_first(written_by_transformers: Path) -> None:
    """Catches [up, gate], which transformers' fused [E, 2I, H] would not have either."""
    parameters = dict(from_hf(written_by_transformers).named_parameters())
    file = stored(written_by_transformers)
    prefix = "model.layers.1.mlp.experts"
    stack = parameters[f"{prefix}.gate_up_proj"]  # [E, 2, I, H]
    assert torch.equal(stack[7, 0], file[f"{prefix}.7.gate_proj.weight"])
    assert torch.equal(stack[7, 1], file[f"{prefix}.7.up_proj.weight"])
    fused = peer.load(written_by_transformers).model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(stack.flatten(1, 2), fused)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": peer.yarn()}])
def test_transformers_reads_what_we_wrote(
    tmp_path: Path, shard_bytes: int, changes: dict[str, Any]
) -> None:
    """Catches a config.json or a name that transformers understands differently."""
    original = peer.build_peer(changes)
    model = from_hf(peer.save(original, tmp_path / "theirs"))
    to_hf(model, tmp_path / "ours", shard_bytes)
    assert (tmp_path / "ours" / shards.INDEX).exists() == (shard_bytes == 60_000)
    back = peer.load(tmp_path / "ours")
    assert_same(back.state_dict(), original.state_dict())
    with torch.no_grad():
        assert torch.equal(back(TOKENS).logits, original(TOKENS).logits)
    assert_same(weights_of(from_hf(tmp_path / "ours")), weights_of(model))


def test_transformers_takes_our_number_of_key_value_heads(
    written_by_transformers: Path, tmp_path: Path
) -> None:
    """Catches num_key_value_heads left out: transformers then builds 128 of them."""
    to_hf(from_hf(written_by_transformers), tmp_path)
    assert peer.load(tmp_path).config.num_key_value_heads == 4
    assert "num_key_value_heads" in json.loads((tmp_path / "config.json").read_text())


def test_a_released_kimi_k2_directory(checkpoint: Path) -> None:
    """Catches the model type kimi_k2 refused, and remote code named in the export.

    Some releases carry each layer's RoPE frequencies, which follow from config.json.
    """
    before = weights_of(from_hf(checkpoint))
    edit_config(
        checkpoint, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.X"}
    )
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 2)}
    edit(checkpoint, **frequencies, **{"model.rotary_emb.inv_freq": torch.ones(4)})
    model = from_hf(checkpoint)
    assert_same(weights_of(model), before)
    to_hf(model, checkpoint / "export")
    config = json.loads((checkpoint / "export" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert "auto_map" not in config
    peer.load(checkpoint / "export")


def test_public_names() -> None:
    """Catches a public name that points elsewhere."""
    assert kimi_pretrain.from_hf is from_hf
    assert kimi_pretrain.to_hf is to_hf


# Types


def test_bf16_model_keeps_the_router_bias_in_fp32(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a bias rounded to bf16: steps of 0.001 vanish, and experts change."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = stored(checkpoint)[name]
    assert not torch.equal(bias, bias.bfloat16().float())
    model = from_hf(checkpoint, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    to_hf(model, tmp_path / "export")
    for tensors in (weights_of(model), stored(tmp_path / "export")):
        assert tensors[name].dtype == torch.float32
        assert torch.equal(tensors[name], bias)
    assert json.loads((tmp_path / "export/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_bf16_file_into_wider_models(checkpoint: Path) -> None:
    """Catches parameters that take the type of the file instead of the one asked for."""
    save_file(
        {name: tensor.bfloat16() for name, tensor in stored(checkpoint).items()},
        checkpoint / "model.safetensors",
    )
    file = stored(checkpoint)
    for dtype in (torch.float32, torch.float64):
        expected = {name: tensor.to(dtype) for name, tensor in file.items()}
        assert_same(weights_of(from_hf(checkpoint, dtype)), expected)


def test_the_model_trains_and_leaves_the_file_alone(checkpoint: Path) -> None:
    """Catches parameters that are views of the mapped file, or do not take gradients."""
    before = stored(checkpoint)
    model = from_hf(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.loss(TOKENS, TOKENS.roll(-1, 1)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert weights_of(model).keys() == before.keys()


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.2.mlp.experts.11.up_proj.weight": None},
            r"tensor model\.layers\.2\.mlp\.experts\.11\.up_proj\.weight: got 'missing'; ",
        ),
        (
            {"model.layers.1.mlp.gate.e_score_correction_bias": None},
            r"tensor model\.layers\.1\.mlp\.gate\.e_score_correction_bias: got 'missing'; ",
        ),
        (
            {"model.norm.weight": None, "lm_head.weight": None},
            r"got 'missing \(and 1 more\)'",
        ),
        (
            {"model.layers.1.mlp.experts.12.up_proj.weight": torch.zeros(24, 48)},
            r"tensor model\.layers\.1\.mlp\.experts\.12\.up_proj\.weight: got 'unexpected'; ",
        ),
        (
            {"model.norm.weight": torch.zeros(47)},
            r"model\.norm\.weight in model\.safetensors: shape: got \[47\]; .*\[48\]",
        ),
        (
            {"model.layers.0.mlp.down_proj.weight": torch.zeros(72, 48)},
            r"down_proj\.weight in model\.safetensors: shape: got \[72, 48\]; .*\[48, 72\]",
        ),
        (
            {"lm_head.weight": torch.zeros(97, 48, dtype=torch.int32)},
            r"lm_head\.weight in model\.safetensors: type: got 'I32'; ",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    checkpoint: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    """Catches a part of the model left at random values, or a transposed matrix."""
    edit(checkpoint, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        from_hf(checkpoint)
    assert "; try " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_with_fewer_layers(checkpoint: Path) -> None:
    """Catches a checkpoint silently cut to the layers that config.json mentions."""
    edit_config(checkpoint, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.2\..*: got 'unexpected \(and"):
        from_hf(checkpoint)


def test_multi_token_prediction_layers_are_left_out_with_a_word(checkpoint: Path) -> None:
    """Catches DeepSeek-V3's layer 61 refused, loaded as a layer, or dropped in silence."""
    before = weights_of(from_hf(checkpoint))
    edit(
        checkpoint,
        **{
            "model.layers.3.enorm.weight": torch.ones(48),
            "model.layers.3.shared_head.head.weight": torch.ones(97, 48),
        },
    )
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.3\.enorm\.weight: got 'unexpec"):
        from_hf(checkpoint)
    edit_config(checkpoint, num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match=r"2 tensors of 1 multi-token-prediction layer.*3 layers"):
        model = from_hf(checkpoint)
    assert_same(weights_of(model), before)
    assert model.config.num_nextn_predict_layers == 0


def test_declared_but_absent_prediction_layers_are_no_news(checkpoint: Path) -> None:
    """Catches a warning for every file of transformers, which writes 1 by default."""
    edit_config(checkpoint, num_nextn_predict_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_hf(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_group", 12, "needs at least two"),  # of its experts, to be scored
        ("qk_rope_head_dim", 7, "an even number"),
        ("num_experts_per_tok", 13, "chooses among the 12 experts"),
    ],
)
def test_an_impossible_configuration(checkpoint: Path, key: str, value: int, message: str) -> None:
    """Catches a config.json that skips the checks of a composed configuration."""
    edit_config(checkpoint, **{key: value})
    with pytest.raises(ConfigError, match=rf"{key}: got {value}; .*{message}"):
        from_hf(checkpoint)


def test_refusal_comes_before_allocation(checkpoint: Path) -> None:
    """Catches a parameter allocated for a shape that the file does not have."""
    edit_config(checkpoint, vocab_size=10**13)
    with pytest.raises(ConfigError, match=r"shape: got \[97, 48\]"):
        from_hf(checkpoint)


def test_a_directory_of_pickles(checkpoint: Path) -> None:
    """Catches a fall back to torch.load."""
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match="never read"):
        from_hf(checkpoint)


@pytest.mark.parametrize("text", [None, "", "[1]", "{"])
def test_no_readable_configuration(checkpoint: Path, text: str | None) -> None:
    """Catches a traceback where a user forgot or broke a file."""
    (checkpoint / "config.json").unlink()
    if text is not None:
        (checkpoint / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: got .*; try "):
        from_hf(checkpoint)


def test_no_such_directory(tmp_path: Path) -> None:
    """Catches a name taken for a model to download."""
    with pytest.raises(ConfigError, match="moonshotai/Kimi-K2-Base'; a checkpoint is a directory"):
        from_hf(tmp_path / "moonshotai/Kimi-K2-Base")
