"""The names a configuration may choose are those that something is registered under."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kimi_pretrain.config import compose, names
from kimi_pretrain.config.schema import ScheduleConfig, StageConfig
from kimi_pretrain.data.recipes import RECIPES
from kimi_pretrain.data.tokenizers import KINDS
from kimi_pretrain.data.tokenizers.bytes import ByteTokenizer
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.lr import learning_rate
from kimi_pretrain.optim.orthogonalize import COEFFICIENTS
from kimi_pretrain.optim.registry import build_optimizer
from kimi_pretrain.telemetry.sinks import SINKS


def test_sinks() -> None:
    """Catches a sink that exists but cannot be chosen, or the reverse."""
    assert set(names.SINKS) == set(SINKS)


def test_tokenizers() -> None:
    """Catches a tokenizer that exists but cannot be chosen, or the reverse."""
    assert set(names.TOKENIZERS) == set(KINDS)
    assert ByteTokenizer().vocab_size == names.BYTES_VOCABULARY


def test_recipes() -> None:
    """Catches a recipe that cannot be chosen, or whose domains the mixture may not name."""
    assert set(names.RECIPES) == set(RECIPES)
    for recipe in RECIPES.values():
        assert set(names.RECIPES[recipe.name]) == set(recipe.sample_bytes)


def test_newton_schulz_tables() -> None:
    """Catches a table that exists but cannot be chosen, or the reverse."""
    assert set(names.NEWTON_SCHULZ_TABLES) == set(COEFFICIENTS)


@pytest.mark.parametrize("name", names.OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """Catches an optimizer that may be chosen and does not exist."""
    config = compose(["model=k2_micro"])
    weight = nn.Parameter(torch.ones(4, 4))
    build_optimizer(replace(config.optimizer, name=name), config.model, [("weight", weight)])


@pytest.mark.parametrize("name", names.PRECISIONS)
def test_precisions(name: str) -> None:
    """Catches a precision that may be chosen and does not exist."""
    assert resolve(name).is_floating_point


@pytest.mark.parametrize("shape", names.STAGE_SHAPES)
def test_stage_shapes(shape: str) -> None:
    """Catches a shape that may be chosen and does not exist."""
    stage = StageConfig(name="only", shape=shape, steps=3, to=0.5)
    schedule = ScheduleConfig(global_batch_size=1, micro_batch_size=1, stages=[stage])
    assert learning_rate(schedule, 2.0, 1, step=2) == pytest.approx(1.0)
