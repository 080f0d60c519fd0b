"""Steps added up and GPUs read for a row of ranks.jsonl, on one rank."""

from types import SimpleNamespace

import pytest
import torch

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.telemetry.breakdown import PARTS
from kimi_pretrain.train.comparison import Comparison, gpu_of
from tests.telemetry.fake_nvml import FakeGpu, install


def test_a_row_is_the_mean_step_since_the_last_one() -> None:
    """Catches sums told as a step's, and steps that the next row counts again."""
    comparison = Comparison(open_world(ParallelConfig()), None)
    comparison.add(dict.fromkeys(PARTS, 1.0))
    comparison.add({"compute": 2.0, "data": 0.5})
    row = comparison.row(2)
    assert (row["step"], row["steps"]) == (2, 2)
    assert row["parts"]["compute"]["max"] == 1.5
    assert row["parts"]["data"]["max"] == 0.75
    assert row["parts"]["ep"]["max"] == 0.5
    assert "devices" not in row
    comparison.add({"compute": 4.0})
    assert comparison.row(3)["parts"]["compute"] == {"min": 4.0, "median": 4.0, "max": 4.0}


def test_a_rank_s_own_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches GPU 0 read by every rank of a node: torch's numbers are not NVML's."""
    install(monkeypatch, [FakeGpu(uuid="GPU-0"), FakeGpu(uuid="GPU-b", reasons=0x40)])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b")
    )
    gpu, why_not = gpu_of(torch.device("cuda", 0))
    assert why_not == ""
    row = Comparison(open_world(ParallelConfig()), gpu).row(1)
    assert row["devices"]["power_watts"]["max"] == 640.0
    assert [each["why"] for each in row["unhealthy"]] == [["hardware thermal slowdown"]]


def test_readings_that_will_be_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run on GPUs without a reading and without a word, and a word where there is no
    GPU at all."""
    install(monkeypatch, [], driver=None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b")
    )
    gpu, why_not = gpu_of(torch.device("cuda", 0))
    assert gpu is None
    assert "NVML Shared Library Not Found" in why_not
    assert gpu_of(torch.device("cpu")) == (None, "")
