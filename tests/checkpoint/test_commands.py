"""`kimi-pretrain ckpt`, from any layout's checkpoint to a Hugging Face model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kimi_pretrain
from kimi_pretrain.checkpoint import shards
from kimi_pretrain.checkpoint.commit import commit
from kimi_pretrain.checkpoint.export import export
from kimi_pretrain.checkpoint.hf import to_hf
from kimi_pretrain.checkpoint.state import snapshot, write
from kimi_pretrain.checkpoint.store import CheckpointError
from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.config.saved import save_config
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.optim.registry import build_optimizer
from tests.checkpoint.held import deal, even

CONFIG = compose(["experiment=smoke", "run_dir=unused", "model.n_routed_experts=4"])
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def _run(directory: Path, precision: str, world: int, step: int = 30) -> CausalLM:
    """A run directory with a checkpoint of `world` ranks; its model, biases not zero."""
    dtype = KINDS[precision]
    model = from_config(CONFIG.model, dtype=dtype, seed=step)
    optimizer = build_optimizer(CONFIG.optimizer, CONFIG.model, model.named_parameters())
    masters = {name: t for name, kind, t in optimizer.named_state() if kind == "master"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masters:  # more bits than bf16 has
                masters[name].normal_()
                parameter.copy_(masters[name])
        for _, buffer in model.hf_named_buffers():
            buffer.normal_()
    state = {"step": step, "dtype": str(dtype)}
    whole = snapshot(model, optimizer, state)
    biases = dict(model.hf_named_buffers())
    tensors = {
        ("master", name): torch.from_numpy(array)
        for name, array in whole.weights.items()
        if name not in biases
    }
    root = directory / "checkpoints"
    for rank in reversed(range(world)):
        held = deal(tensors, even(tensors, world), world)[rank]
        taken = whole if world == 1 else snapshot(model, held, state, rank, world)
        commit(root, step, lambda d, taken=taken: write(d, taken), rank, world)
    save_config(CONFIG, directory / "config.yaml")
    return model


def _tensors(model: CausalLM) -> dict[str, Tensor]:
    return dict(model.hf_named_parameters()) | dict(model.hf_named_buffers())


def _line(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a refused command prints."""
    assert main(["ckpt", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("precision", "world"), [("bf16", 1), ("bf16", 3), ("fp32", 3), ("fp64", 2)]
)
def test_an_export_is_the_model(tmp_path: Path, precision: str, world: int) -> None:
    """Catches parts put together in the wrong order, a bias rounded to bf16, and another type
    than the run's."""
    model = _run(tmp_path / "run", precision, world)
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    loaded = kimi_pretrain.from_hf(tmp_path / "out", dtype=KINDS[precision])
    want = _tensors(model)
    for name, tensor in _tensors(loaded).items():
        assert tensor.dtype == want[name].dtype, name
        assert torch.equal(tensor, want[name]), name
    to_hf(model, tmp_path / "direct")
    for file in (tmp_path / "direct").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_fp32_of_a_bf16_run_is_its_masters(tmp_path: Path) -> None:
    """Catches masters that went through bf16 on the way out."""
    _run(tmp_path / "run", "bf16", 2)
    step = tmp_path / "run/checkpoints/step-00000030"
    assert main(["ckpt", "export", str(step), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    loaded = _tensors(kimi_pretrain.from_hf(tmp_path / "out", dtype=torch.float32))
    head = loaded["lm_head.weight"]
    assert not torch.equal(head, head.bfloat16().float())


def test_an_export_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export that reads the whole model before it writes the first shard."""
    model = _run(tmp_path / "run", "bf16", 3)
    in_memory: list[int] = []
    save = shards._save

    def recorded(path: Path, tensors: dict[str, Tensor]) -> None:
        in_memory.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(path, tensors)

    monkeypatch.setattr(shards, "_save", recorded)
    limit = 20_000
    checkpoint = tmp_path / "run/checkpoints/step-00000030"
    export(checkpoint, CONFIG.model, tmp_path / "out", shard_bytes=limit)
    total = sum(tensor.nbytes for tensor in _tensors(model).values())
    largest = max(tensor.nbytes for tensor in _tensors(model).values())
    assert sum(in_memory) == total
    assert max(in_memory) <= max(limit, largest) < total
    loaded = kimi_pretrain.from_hf(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_newest_whole_one_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export of damaged weights, or of an older step without a word."""
    _run(tmp_path / "run", "bf16", 2, step=20)
    _run(tmp_path / "run", "bf16", 3, step=30)
    damaged = tmp_path / "run/checkpoints/step-00000030/weights-00002-of-00003.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # one bit
    damaged.write_bytes(content)
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "step 20" in captured.out
    assert damaged.name in captured.err
    assert damaged.name in _line(capsys, "export", damaged.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a damaged checkpoint shown as good, and exit code 0 after damage."""
    _run(tmp_path / "run", "bf16", 1, step=20)
    _run(tmp_path / "run", "bf16", 3, step=30)
    newest = tmp_path / "run/checkpoints/step-00000030"
    size = sum(p.stat().st_size for p in newest.iterdir() if p.name != "manifest.json")
    assert main(["ckpt", "list", str(tmp_path / "run")]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["30", "3", f"{size:,}", "yes"]
    assert second.split()[:2] == ["20", "1"]
    assert main(["ckpt", "verify", str(tmp_path / "run")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    (newest / "optimizer-00003-of-00003.safetensors").unlink()
    assert main(["ckpt", "verify", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert "optimizer-00003-of-00003.safetensors: missing" in captured.err
    assert "step-00000020: whole" in captured.out
    assert main(["ckpt", "list", str(tmp_path / "run")]) == 0
    assert "no: " in capsys.readouterr().out
    (newest / "manifest.json").write_text("{")
    assert main(["ckpt", "list", str(tmp_path / "run")]) == 0
    assert "? " in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, a usage text, or an export over files that were there."""
    run, out = tmp_path / "run", tmp_path / "out"
    _run(run, "bf16", 1)
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    assert "never overwrites" in _line(capsys, "export", run, out)
    assert (out / "model.safetensors").read_text() == "mine"
    assert "never overwrites" in _line(capsys, "export", run, out / "model.safetensors")
    assert "--dtype" in _line(capsys, "export", run, tmp_path / "new", "--dtype", "fp8")
    assert "step-00000100" in _line(capsys, "export", tmp_path / "nowhere", tmp_path / "new")
    assert "step-00000100" in _line(capsys, "list", out)
    assert "required" in _line(capsys, "export", run)
    assert "invalid choice" in _line(capsys, "exprot", run)
    (run / "config.yaml").unlink()
    assert "config.yaml" in _line(capsys, "export", run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a model with layers missing, exported under a configuration edited by hand."""
    run = tmp_path / "run"
    _run(run, "bf16", 2)
    text = (run / "config.yaml").read_text()
    layers = CONFIG.model.num_hidden_layers
    for other in (layers - 1, layers + 1):
        changed = text.replace(f"num_hidden_layers: {layers}", f"num_hidden_layers: {other}")
        (run / "config.yaml").write_text(changed)
        assert f"model.layers.{min(other, layers)}" in _line(capsys, "export", run, tmp_path / "o")
    (run / "config.yaml").write_text("model: 3")
    assert "model" in _line(capsys, "export", run, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_run_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    """Catches an export in a guessed type."""
    model = from_config(CONFIG.model)
    optimizer = build_optimizer(CONFIG.optimizer, CONFIG.model, model.named_parameters())
    directory = commit(
        tmp_path, 1, lambda d: write(d, snapshot(model, optimizer, {"dtype": "torch.int8"}))
    )
    with pytest.raises(CheckpointError, match=r"torch\.int8"):
        export(directory, CONFIG.model, tmp_path / "out")
