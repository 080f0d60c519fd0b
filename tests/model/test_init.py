"""Initial weights."""

from collections.abc import Callable

import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.init import initialise, seed_of

TinyConfig = Callable[..., ModelConfig]


def test_a_chunk_starts_like_the_whole_model(tiny: TinyConfig) -> None:
    """Weights drawn in one stream would depend on which layers a rank holds."""
    cfg = tiny()
    whole = dict(from_config(cfg, seed=5).named_parameters())
    part = Chunk(cfg, range(1, 3), torch.float32)
    initialise(part, cfg, seed=5)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_every_matrix_has_a_draw_of_its_own(tiny: TinyConfig) -> None:
    """Experts that start equal stay equal."""
    matrices = [v for _, v in from_config(tiny()).hf_named_parameters() if v.ndim == 2]
    corners = [tuple(m.flatten()[:4].tolist()) for m in matrices]
    assert len(set(corners)) == len(corners)


def test_scale_seed_and_norms(tiny: TinyConfig) -> None:
    cfg = tiny(initializer_range=0.02)
    model, other = from_config(cfg, seed=1), from_config(cfg, seed=2)
    gate_up = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert abs(gate_up.std().item() - 0.02) < 5e-4
    assert abs(gate_up.mean().item()) < 5e-4
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert bool((model.get_parameter("model.norm.weight") == 1.0).all())
    assert not any(bool(b.any()) for b in model.buffers())


def test_dtypes_start_from_the_same_draw(tiny: TinyConfig) -> None:
    """normal_ in fp64 draws other numbers than in fp32."""
    low, high = from_config(tiny(), dtype=torch.bfloat16), from_config(tiny(), dtype=torch.float64)
    for a, b in zip(low.parameters(), high.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())


def test_seeds_are_fixed_forever() -> None:
    """Python's hash() differs between processes: ranks would start apart."""
    assert seed_of(0, "lm_head.weight") == SEED_OF_HEAD


SEED_OF_HEAD = 102435142955280535
