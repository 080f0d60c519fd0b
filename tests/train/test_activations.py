"""From a configuration to how a rank keeps its activations."""

import pytest
import torch

from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.activation.timed import TimedStream
from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.stopwatch import Stopwatch
from kimi_pretrain.train.activations import cramped, needless, open_activations
from kimi_pretrain.train.schedule import stages_of, training_schedule

CPU = torch.device("cpu")


def configured(*overrides: str) -> Config:
    pipeline = ["parallel.pp=2", "parallel.vpp=2", "parallel.schedule=k2"]
    return compose(["experiment=smoke", "run_dir=unused", *pipeline, *overrides])


def opened(config: Config, rank: int = 0, dtype: torch.dtype = torch.bfloat16) -> Activations:
    schedule, stages = training_schedule(config), stages_of(config)
    return open_activations(config, schedule, stages, rank, dtype, CPU, Stopwatch(CPU))


def room(activations: Activations) -> int:
    assert activations.offloader is not None
    return activations.offloader.slab.spans.capacity


def test_room_on_the_host_is_the_plans() -> None:
    """Catches a slab that is the same for every rank and dtype, or that a user cannot set."""
    config = configured("activation=k2")
    assert room(opened(config, 0)) != room(opened(config, 1))
    assert min(room(opened(config, rank)) for rank in (0, 1)) > 0
    assert room(opened(config, 0, torch.float32)) == pytest.approx(2 * room(opened(config)), abs=2)
    assert room(opened(configured("activation=k2", "activation.host_bytes=1000"))) == 1000


def test_a_slab_that_is_too_small_is_told_with_the_size_that_is_not() -> None:
    """Catches a run whose tensors stay on the device, and nobody knows why; and idle advice."""
    layers = stages_of(configured())

    def told(*overrides: str) -> str | None:
        config = configured("activation=k2", *overrides)
        return cramped(config, training_schedule(config), layers, torch.bfloat16)

    line = told("activation.host_bytes=1000")
    assert line is not None
    assert "activation.host_bytes=1000 is less than the" in line
    assert "pipeline rank 1 has on the host" in line  # the other has a dense layer
    fix = line.split("; ")[1].split()[0]
    assert told(fix) is None
    assert told() is None
    assert int(fix.split("=")[1]) == room(opened(configured("activation=k2"), rank=1))


def test_waits_for_copies_are_told() -> None:
    """Catches an engine whose waits no stopwatch hears of: they would count as compute."""
    offloader = opened(configured("activation=k2")).offloader
    assert offloader is not None
    assert isinstance(offloader.stream, TimedStream)


def test_without_offloads_there_is_no_engine() -> None:
    """Catches a copy thread and a slab in a run that never uses them."""
    assert opened(configured()).offloader is None
    recompute = ["activation.policy=custom", "+activation.tags.norm_out=recompute"]
    assert opened(configured(*recompute)).offloader is None


def test_fp8_of_float64_is_refused_at_the_start() -> None:
    """Catches a run that ends at its first expert."""
    with pytest.raises(ConfigError, match="expert_up_in is FP8, and its tiles are cut from bf16"):
        opened(configured("activation=k2"), dtype=torch.float64)


def test_outputs_that_need_not_be_kept_are_told_at_the_start() -> None:
    """Catches K2's policy without what makes it cheap, in silence: 114,688 bytes of every token
    and layer that no run of it needs; and advice where there is nothing to gain."""
    k2 = ["model=k2", "activation=k2"]
    told = needless(configured(*k2), torch.bfloat16)
    assert told is not None
    assert "114,688 bytes" in told
    assert "parallel.router_weights=before_down" in told
    for quiet in (
        [*k2, "parallel.router_weights=before_down"],
        ["model=k2"],
        ["activation=k2", "model.first_k_dense_replace=${model.num_hidden_layers}"],
    ):
        assert needless(configured(*quiet), torch.bfloat16) is None
