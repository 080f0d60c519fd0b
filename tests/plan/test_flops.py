"""Training FLOPs a token against the reference figures."""

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.plan.flops import training_flops_per_token


@pytest.mark.parametrize(
    ("name", "sequence_length", "giga_flops"),
    [
        ("k2", 4096, 205.47),
        ("k2", 32768, 312.9),
        ("deepseek_v3", 4096, 250.45),
        ("moonlight_16b", 4096, 17.17),
    ],
)
def test_flops_per_token(name: str, sequence_length: int, giga_flops: float) -> None:
    """Catches attention counted in full instead of causal, or the embedding counted as a matmul."""
    model = compose([f"model={name}"]).model
    digits = len(str(giga_flops).split(".")[1])
    assert round(training_flops_per_token(model, sequence_length) / 1e9, digits) == giga_flops


def test_linear_flops_per_token() -> None:
    """Catches matrices and attention that are wrong by the same amount: without context only
    matrices are left."""
    assert round(training_flops_per_token(compose(["model=k2"]).model, 0) / 1e9, 2) == 190.12
