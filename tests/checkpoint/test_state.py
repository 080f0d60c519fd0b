"""Saved by N ranks, loaded by M: the same bits, or an error that names what is wrong."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from kimi_pretrain.checkpoint.state import Snapshot, load, restore, snapshot, write
from kimi_pretrain.checkpoint.store import CheckpointError
from kimi_pretrain.config import compose
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.optim.muon import MuonClip
from kimi_pretrain.optim.piece import Piece
from kimi_pretrain.optim.registry import build_optimizer
from tests.checkpoint.held import Buffers, Cuts, Held, deal, even, random_bits, same_bits, save

SHAPES = {
    ("master", "model.norm.weight"): (7,),
    ("master", "lm_head.weight"): (5, 6),
    ("momentum", "lm_head.weight"): (5, 6),
    ("exp_avg", "model.norm.weight"): (7,),
    ("exp_avg_sq", "scale"): (),
}


def _tensors(seed: int) -> dict[tuple[str, str], Tensor]:
    return {key: random_bits(*s, seed=seed + i) for i, (key, s) in enumerate(SHAPES.items())}


def _zeros() -> dict[tuple[str, str], Tensor]:
    return {key: torch.zeros(shape) for key, shape in SHAPES.items()}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, Cuts]:
    """A number of ranks and a cut of every tensor, with empty pieces and idle ranks."""
    world = draw(st.integers(1, 5))
    cuts: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for key, tensor in _zeros().items():
        total = tensor.numel()
        stops = sorted(draw(st.lists(st.integers(0, total), max_size=5)))
        cuts[key] = [(stop, draw(st.integers(0, world - 1))) for stop in [*stops, total]]
    return world, cuts


@given(worlds(), worlds(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_cut_loads_at_any_other(
    saved: tuple[int, Cuts], loaded: tuple[int, Cuts], seed: int
) -> None:
    """Catches a part under a wrong range, rows of a matrix shifted, a rank that reads its own
    file only, and a conversion that changes a bit."""
    want, bias = _tensors(seed), random_bits(4, seed=seed + 99)
    writers = deal(want, saved[1], saved[0])
    for rank in writers:
        rank.steps, rank.last_clipped_step = 12, 7
    with tempfile.TemporaryDirectory() as root:
        directory = save(Path(root), 12, writers, bias)
        got = _zeros()
        for rank in deal(got, loaded[1], loaded[0]):
            model = Buffers(torch.zeros(4))
            state = restore(directory, model, rank)  # type: ignore[arg-type]
            assert state["step"] == rank.steps == 12
            assert rank.last_clipped_step == 7
            assert rank.published == 1
            assert same_bits(model.bias, bias)
    for key, tensor in want.items():
        assert same_bits(got[key], tensor), key


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 3), (3, 1)])
def test_layouts_of_a_real_model(tmp_path: Path, before: int, after: int) -> None:
    """Catches names of a stack of experts that differ between MuonClip and pieces, parameters
    that do not follow their masters, and a rank that needs the whole of another's file."""
    model, optimizer = _muonclip(seed=3)
    want = _whole(model, optimizer)
    bias = dict(model.hf_named_buffers())
    if before == 1:
        write(tmp_path, snapshot(model, optimizer, {"step": 5}))
    else:
        for rank, held in enumerate(deal(want, even(want, before), before)):
            held.steps, held.last_clipped_step = 5, None
            write(tmp_path, snapshot(model, held, {"step": 5}, rank, before))
    other, loaded = _muonclip(seed=4)
    if after == 1:
        restore(tmp_path, other, loaded)
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name]), name
        got = _whole(other, loaded)
    else:
        got = {key: torch.zeros_like(tensor) for key, tensor in want.items()}
        for held in deal(got, even(got, after), after):
            restore(tmp_path, other, held)
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key
    for name, buffer in other.hf_named_buffers():
        assert torch.equal(buffer, bias[name]), name


def test_one_rank_writes_plain_files(tmp_path: Path) -> None:
    """Catches a checkpoint of one process that other readers of safetensors cannot use."""
    tensors, bias = _tensors(0), torch.ones(4)
    ranks = deal(tensors, even(tensors, 1), 1)
    names = write(tmp_path, snapshot(Buffers(bias), ranks[0], {"step": 1}))  # type: ignore[arg-type]
    assert names == ["weights.safetensors", "optimizer.safetensors", "state.json"]
    weights = load_file(tmp_path / names[0])
    assert weights["lm_head.weight"].shape == (5, 6)
    assert set(load_file(tmp_path / names[1])) == {
        "momentum/lm_head.weight",
        "exp_avg/model.norm.weight",
        "exp_avg_sq/scale",
    }
    with safe_open(tmp_path / names[0], framework="np") as file:
        assert file.metadata() is None


def test_a_snapshot_does_not_follow_the_run() -> None:
    """Catches a view of live state that the background thread writes one step late."""
    tensors, bias = _tensors(0), torch.zeros(4)
    (rank,) = deal(tensors, even(tensors, 1), 1)
    taken = snapshot(Buffers(bias), rank, {})  # type: ignore[arg-type]
    before = taken.weights["lm_head.weight"].tobytes()
    for tensor in (*tensors.values(), bias):
        tensor.fill_(3.0)
    assert taken.weights["lm_head.weight"].tobytes() == before
    assert not taken.weights["model.layers.1.mlp.gate.e_score_correction_bias"].any()


def test_a_piece_held_twice_is_refused() -> None:
    """Catches one rank's overlap, which a dictionary of keys would hide."""
    piece = Piece("master", "w", (4,), 0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"w\[0:2\] of weights twice"):
        snapshot(Buffers(torch.zeros(1)), Held([piece, piece]), {}, 1, 2)  # type: ignore[arg-type]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A checkpoint of three ranks."""
    tensors = _tensors(0)
    return save(tmp_path, 1, deal(tensors, even(tensors, 3), 3), torch.zeros(4))


def _load(directory: Path, shape: tuple[int, ...] = (5, 6), name: str = "lm_head.weight") -> None:
    values = torch.zeros(shape).view(-1)[:1]
    load(directory, Buffers(torch.zeros(4)), Held([Piece("master", name, shape, 0, values)]))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["gap", "overlap", "file", "size", "other shape", "cut off"])
def test_what_does_not_fit_together_is_named(three: Path, change: str) -> None:
    """Catches a load that leaves elements as they were, or takes one of two values."""
    path = three / "weights-00002-of-00003.safetensors"
    tensors = load_file(path)
    shapes = '{"lm_head.weight": [5, 6], "model.norm.weight": [7]}'
    part = "lm_head.weight[10:20]"
    want = r"lm_head\.weight"
    if change == "gap":
        del tensors[part]
        want += r": \[10:20\] of 30 elements missing after weights-00001"
    elif change == "overlap":
        tensors["lm_head.weight[9:20]"] = np.zeros(11, np.float32)
        del tensors[part]
        want += r": \[9:10\] of 30 elements both in weights-00001.*00002-of-00003"
    elif change == "size":
        tensors[part] = tensors[part][:-1]
        want = r"weights-00002-of-00003\.safetensors: lm_head.weight\[10:20\] is \[9\]"
    elif change == "other shape":
        shapes = shapes.replace("5, 6", "6, 5")
        want += r" is \[6, 5\], weights-00001-of-00003.safetensors says \[5, 6\]"
    save_file(tensors, path, metadata={"shapes": shapes})
    if change == "file":
        path.unlink()
        want = r"weights-00002-of-00003\.safetensors: missing"
    elif change == "cut off":
        path.write_bytes(path.read_bytes()[:-5])
        want = r"weights-00002-of-00003\.safetensors: not readable"
    with pytest.raises(CheckpointError, match=want):
        _load(three)


def test_another_model_is_named(three: Path) -> None:
    """Catches a checkpoint of another model that loads what happens to be there."""
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[5, 6\].*needs \[6, 5\]"):
        _load(three, (6, 5))
    with pytest.raises(CheckpointError, match=r"holds model\.embed_tokens\.weight"):
        _load(three, name="model.embed_tokens.weight")
    (three / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        _load(three)


def test_a_rank_holds_only_its_share(tmp_path: Path) -> None:
    """Catches ranks that each write everything: N times the bytes."""
    tensors = _tensors(0)
    taken: list[Snapshot] = [
        snapshot(Buffers(torch.zeros(4)), rank, {}, number, 3)  # type: ignore[arg-type]
        for number, rank in enumerate(deal(tensors, even(tensors, 3), 3))
    ]
    held = sum(a.size for s in taken for a in (*s.weights.values(), *s.optimizer.values()))
    assert held == sum(tensor.numel() for tensor in tensors.values()) + 4


def _muonclip(seed: int) -> tuple[CausalLM, MuonClip]:
    """A bf16 model whose masters, moments and biases are all random."""
    config = compose(["experiment=smoke", "run_dir=unused", "model.n_routed_experts=4"])
    model = from_config(config.model, dtype=torch.bfloat16, seed=seed)
    optimizer = build_optimizer(config.optimizer, config.model, model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, kind, tensor in optimizer.named_state():
            tensor.normal_(generator=generator)
            if kind == "master":
                model.get_parameter(name).copy_(tensor)
        for _, buffer in model.hf_named_buffers():
            buffer.normal_(generator=generator)
    optimizer.steps = 5
    return model, optimizer


def _whole(model: CausalLM, optimizer: MuonClip) -> dict[tuple[str, str], Tensor]:
    """Every tensor by (kind, name), by way of a snapshot's keys."""
    taken = snapshot(model, optimizer, {})
    biases = dict(model.hf_named_buffers())
    weights = {("master", n): a for n, a in taken.weights.items() if n not in biases}
    moments = {tuple(key.split("/", 1)): a for key, a in taken.optimizer.items()}
    return {(k, n): torch.from_numpy(a) for (k, n), a in (weights | moments).items()}
