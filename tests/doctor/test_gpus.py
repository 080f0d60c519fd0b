"""GPUs of a host, from a stand-in of pynvml."""

from dataclasses import replace

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding
from kimi_pretrain.doctor.gpus import gpu_findings, has_gpus, look_at_gpus
from tests.telemetry.fake_nvml import FakeGpu, install

H800 = compose(["cluster=h800"]).cluster
LOCAL = compose([]).cluster


def found(monkeypatch: pytest.MonkeyPatch, gpus: list[FakeGpu]) -> list[Finding]:
    install(monkeypatch, gpus)
    driver, told, why_none = look_at_gpus()
    assert driver == "570.86"
    return gpu_findings(told, why_none, H800)


def eight() -> list[FakeGpu]:
    return [FakeGpu(uuid=f"GPU-{number}") for number in range(8)]


def test_a_good_node_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an alarm at the power cap, where GPUs at work are."""
    (only,) = found(monkeypatch, eight())
    assert (only.level, only.text) == (OK, "8 x NVIDIA H800, 8 NVLinks of 26.6 GB/s each, all up")


def test_each_thing_that_is_wrong_is_named_with_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a node that is fit but for one of its GPUs."""
    gpus = eight()
    gpus[2].links = (True,) * 7 + (False,)
    gpus[5].reasons, gpus[5].ecc = 0x40, 2
    told = [(each.level, each.what, each.text) for each in found(monkeypatch, gpus)]
    assert told == [
        (BAD, "GPU 2", "7 of 8 NVLinks are up"),
        (BAD, "GPU 5", "hardware thermal slowdown"),
        (BAD, "GPU 5", "2 uncorrected ECC errors"),
    ]


def test_a_missing_gpu_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GPU that fell off the bus and is not asked."""
    (only,) = found(monkeypatch, eight()[:7])
    assert (only.level, only.text) == (BAD, "7 of 8 are there")


def test_no_gpu_matters_where_there_should_be_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a laptop that is not fit, and a GPU node without a driver that is."""
    install(monkeypatch, [], driver=None)
    driver, told, why_none = look_at_gpus()
    assert (driver, told) == ("", [])
    (here,) = gpu_findings(told, why_none, LOCAL)
    assert here.level == NOTE
    assert here.text == "no GPU here (no NVIDIA driver answers: NVML Shared Library Not Found)"
    (there,) = gpu_findings(told, why_none, H800)
    assert there.level == BAD


def test_what_a_cluster_has_goes_by_its_device() -> None:
    """Catches a site's cluster of CPUs that is not fit without GPUs, because of its name."""
    ours = replace(compose(["cluster=cpu"]).cluster, name="ours")
    assert not has_gpus(ours)
    assert has_gpus(replace(H800, name="cpu"))
    assert not has_gpus(LOCAL)
