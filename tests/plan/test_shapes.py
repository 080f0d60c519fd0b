"""The planner's parameters against the model that runs."""

import subprocess
import sys

import pytest
import torch

from kimi_pretrain.config import compose
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.optim.groups import uses_muon
from kimi_pretrain.plan.parameters import count_parameters
from kimi_pretrain.plan.shapes import stage_specs


@pytest.mark.parametrize(
    ("name", "layers", "ep"),
    [
        ("k2_nano", None, 1),
        ("k2_nano", None, 4),
        ("k2", range(3), 16),
        ("k2", range(59, 61), 1),
        ("k2", range(30, 31), 8),
        ("deepseek_v3", range(2, 5), 1),  # three dense layers
        ("moonlight_16b", None, 2),  # no q_lora_rank, two shared experts
    ],
)
def test_specs_are_the_models_parameters(name: str, layers: range | None, ep: int) -> None:
    """Catches a plan of another model than the one that runs: a name, a shape or the order."""
    model = compose([f"model={name}"]).model
    layers = range(model.num_hidden_layers) if layers is None else layers
    experts = range(model.n_routed_experts // ep)
    with torch.device("meta"):
        chunk = Chunk(model, layers, torch.bfloat16, experts)
    built = [(name, tuple(parameter.shape)) for name, parameter in chunk.named_parameters()]
    specs = stage_specs(model, layers, ep)
    assert [(spec.name, spec.shape) for spec in specs] == built
    assert all(spec.muon == uses_muon(spec.name, len(spec.shape)) for spec in specs)


@pytest.mark.parametrize("name", ["k2", "deepseek_v3", "moonlight_16b", "k2_nano"])
def test_the_stages_hold_the_whole_model_once(name: str) -> None:
    """Catches experts counted ep times, or a shared expert marked as a routed one."""
    model = compose([f"model={name}"]).model
    ep = 4
    half = model.num_hidden_layers // 2
    total = 0
    for layers in (range(half), range(half, model.num_hidden_layers)):
        specs = stage_specs(model, layers, ep)
        total += sum(spec.elements * (ep if spec.expert else 1) for spec in specs)
    assert total == count_parameters(model).total


def test_no_torch_is_imported() -> None:
    """Catches a plan that costs the seconds of importing torch."""
    program = (
        "import sys; import kimi_pretrain.plan.shapes, kimi_pretrain.optim.layout,"
        " kimi_pretrain.optim.exchange; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
