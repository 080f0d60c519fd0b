"""FP8 releases with scales by 128 x 128 blocks, against their dequantised copy."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kimi_pretrain.checkpoint import shards
from kimi_pretrain.checkpoint.hf import from_hf
from kimi_pretrain.config.errors import ConfigError
from tests.checkpoint.hf_files import assert_same, edit, edit_config, stored, weights_of
from tests.model import peer

TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(3))
# Widths with partial edge blocks at both ends: 136 = 128 + 8 rows of kv_a, 200, 130.
FP8_WIDTHS = {
    "hidden_size": 200,
    "q_lora_rank": 130,
    "kv_lora_rank": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 260,
    "moe_intermediate_size": 136,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def is_projection(name: str) -> bool:
    unquantised = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
    return not any(part in name for part in unquantised)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 and block scales of [M, N], block by block."""
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[at].abs().max() / 448.0
            q[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return q, scale


def dequantised(q: Tensor, scale: Tensor) -> Tensor:
    rows, columns = (torch.arange(n) // 128 for n in q.shape)
    return q.float() * scale[rows[:, None], columns[None, :]]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(FP8 release, its dequantised copy). Every scale is in another shard than its weight."""
    model = peer.build_peer(FP8_WIDTHS)
    root = tmp_path_factory.mktemp("fp8")
    source = peer.save(model, root / "source")
    release, copy = root / "release", root / "copy"
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(sorted(stored(source).items())):
        here, there = (first, second) if number % 2 else (second, first)
        if is_projection(name):
            here[name], there[f"{name}_scale_inv"] = quantise(weight)
            plain[name] = dequantised(here[name], there[f"{name}_scale_inv"])
        else:
            here[name] = weight if name.endswith("bias") else weight.bfloat16()
            plain[name] = here[name].float()
    for directory in (release, copy):
        directory.mkdir()
        (directory / "config.json").write_text((source / "config.json").read_text())
    save_file(plain, copy / "model.safetensors")
    files = {
        "model-00001-of-000002.safetensors": first,
        "model-00002-of-000002.safetensors": second,
    }
    for file, tensors in files.items():
        save_file(tensors, release / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (release / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_config(release, model_type="kimi_k2", quantization_config=quantization)
    return release, copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fp8_equals_its_dequantised_copy(fp8: tuple[Path, Path], dtype: torch.dtype) -> None:
    """Catches scales that divide, miss an edge block, or are looked for in the weight's shard."""
    release, copy = fp8
    read, expected = from_hf(release, dtype), from_hf(copy, dtype)
    assert_same(weights_of(read), weights_of(expected))
    with torch.no_grad():
        assert torch.equal(read(TOKENS), expected(TOKENS))


def test_fp8_fixture_has_what_it_is_for(fp8: tuple[Path, Path]) -> None:
    """Catches a fixture without edge blocks, split scales, or an effect of the scales."""
    release, _ = fp8
    weight_map = json.loads((release / shards.INDEX).read_text())["weight_map"]
    scales = [name for name in weight_map if name.endswith("_scale_inv")]
    assert len(scales) == 2 * 5 + 3 + 3 + 3 * 4
    assert all(weight_map[name] != weight_map[name.removesuffix("_scale_inv")] for name in scales)
    tensors = stored(release)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape == (136, 200)
    assert tensors[f"{name}_scale_inv"].shape == (2, 2)
    assert tensors[f"{name}_scale_inv"].unique().numel() == 4


def as_one_file(release: Path, directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text((release / "config.json").read_text())
    save_file(stored(release), directory / "model.safetensors")
    return directory


Q_A = "model.layers.1.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q_A}_scale_inv": None}, rf"{Q_A} in .*: type: got 'F8_E4M3'; .*_scale_inv is there"),
        ({Q_A: None}, rf"tensor {Q_A}: got 'missing"),
        ({Q_A: torch.zeros(130, 200)}, rf"{Q_A} in .*: type: got 'F32'"),
        (
            {f"{Q_A}_scale_inv": torch.ones(1, 1)},
            r"weight_scale_inv in .*: got \('F32', \[1, 1\]\).*\[2, 2\]",
        ),
        ({f"{Q_A}_scale_inv": torch.ones(2, 2).bfloat16()}, r"got \('BF16', \[2, 2\]\)"),
        (
            {Q_A: torch.zeros(130, 200).to(torch.float8_e5m2), f"{Q_A}_scale_inv": None},
            r"type: got 'F8_E5M2'",
        ),
        (
            {"lm_head.weight_scale_inv": torch.ones(1, 2)},
            r"lm_head\.weight in .*: type: got 'BF16'",
        ),
        (
            {"model.norm.bias_scale_inv": torch.ones(1)},
            r"tensor model\.norm\.bias_scale_inv: got 'une",
        ),
    ],
)
def test_fp8_weights_and_scales_belong_together(
    fp8: tuple[Path, Path], tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    """Catches quantised values taken for weights, off by their scale."""
    directory = as_one_file(fp8[0], tmp_path / "one")
    edit(directory, **changes)
    with pytest.raises(ConfigError, match=message):
        from_hf(directory)


def test_tensors_are_read_one_at_a_time(
    fp8: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second copy of the model: K2 has 2 TB of them."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = shards.WeightFiles.read

    def counted(files: shards.WeightFiles, name: str) -> Tensor:
        nonlocal most
        tensor = read(files, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(shards.WeightFiles, "read", counted)
    from_hf(fp8[0])
    assert len(alive) > 50
    assert most <= 2  # a weight and its scales
