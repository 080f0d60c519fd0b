"""Readings of GPUs, from a stand-in of pynvml."""

import math

import pytest

from kimi_pretrain.telemetry import nvml
from kimi_pretrain.telemetry.breakdown import Seat
from kimi_pretrain.telemetry.nvml import Gpu, NoNvml, complaints, device_comparison
from tests.telemetry.fake_nvml import FakeGpu, install


def test_readings_are_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches milliwatts and megahertz told as watts and hertz."""
    install(monkeypatch, [FakeGpu(uuid="GPU-abc")])
    assert Gpu.of_uuid("abc").read() == {
        "power_watts": 640.0,
        "temperature_celsius": 60.0,
        "sm_clock_hertz": 1.755e9,
        "throttle_reasons": 4.0,
        "ecc_uncorrected_errors": 0.0,
        "failed": 0.0,
    }


def test_what_a_card_does_not_offer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a card without ECC that gives no power either, and a nan that looks like errors."""
    install(monkeypatch, [FakeGpu(unsupported={"nvmlDeviceGetTotalEccErrors"})])
    reading = Gpu.of_uuid("GPU-0").read()
    assert math.isnan(reading["ecc_uncorrected_errors"])
    assert reading["power_watts"] == 640.0
    assert complaints(reading) == []


def test_a_lost_gpu_is_told_and_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training run that ends because its thermometer did."""
    gpu = FakeGpu()
    install(monkeypatch, [gpu])
    opened = Gpu.of_uuid("GPU-0")
    gpu.lost = True
    assert complaints(opened.read()) == ["the driver gave no answer"]
    with pytest.raises(NoNvml, match="GPU is lost"):
        opened.describe()


@pytest.mark.parametrize(
    ("reasons", "ecc", "why"),
    [
        (0x4, 0, []),
        (0x1 | 0x2 | 0x10 | 0x100, 0, []),
        (0x8 | 0x4, 0, ["hardware slowdown"]),
        (0x40 | 0x80, 0, ["hardware thermal slowdown", "power brake"]),
        (0, 3, ["3 uncorrected ECC errors"]),
    ],
)
def test_only_what_is_wrong_is_complained_of(
    monkeypatch: pytest.MonkeyPatch, reasons: int, ecc: int, why: list[str]
) -> None:
    """Catches an alarm at the power cap, where every busy GPU is, and a thermal one missed."""
    install(monkeypatch, [FakeGpu(reasons=reasons, ecc=ecc)])
    assert complaints(Gpu.all()[0].read()) == why


def test_the_unwell_gpu_of_many_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hot GPU that drowns in the median."""
    gpus = [FakeGpu(uuid=f"GPU-{n}", temperature=60 + n) for n in range(3)]
    gpus[1].reasons = 0x20
    install(monkeypatch, gpus)
    row = device_comparison(
        [gpu.read() for gpu in Gpu.all()], [Seat(f"node-{n}", 0) for n in "abc"]
    )
    assert row["unhealthy"] == [{"rank": 1, "host": "node-b", "why": ["software thermal slowdown"]}]
    assert row["devices"]["temperature_celsius"] == {"min": 60.0, "median": 61.0, "max": 62.0}


def test_ranks_without_a_gpu_say_nothing() -> None:
    """Catches rows of nan on a CPU."""
    nothing = dict.fromkeys(nvml.READINGS, math.nan)
    assert device_comparison([nothing, nothing], [Seat("a", 0)] * 2) == {}


def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches links that a card does not have counted as links that are down."""
    install(monkeypatch, [FakeGpu(links=(True, False, True, True))])
    told = Gpu.all()[0].describe()
    assert (told["nvlinks_active"], told["nvlinks"]) == (3, 4)
    assert (told["name"], told["memory_bytes"]) == ("NVIDIA H800", 80 << 30)
    assert told["max_sm_clock_hertz"] == 1.98e9
    assert told["nvlink_bytes_per_second"] == 26562e6


def test_a_card_without_nvlink_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a PCIe card that cannot be examined."""
    install(monkeypatch, [FakeGpu(links=(), unsupported={"nvmlDeviceGetFieldValues"})])
    told = Gpu.all()[0].describe()
    assert (told["nvlinks"], told["nvlink_bytes_per_second"]) == (0, None)


def test_no_driver_and_no_package_are_two_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a driver that is down and told as a package to install."""
    install(monkeypatch, [], driver=None)
    with pytest.raises(NoNvml, match="no NVIDIA driver answers: NVML Shared Library Not Found"):
        Gpu.all()
    monkeypatch.setattr(nvml, "find_spec", lambda name: None)
    with pytest.raises(NoNvml, match="pip install nvidia-ml-py"):
        Gpu.all()


def test_a_gpu_that_cuda_has_and_nvml_has_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches readings of another card taken for this rank's."""
    install(monkeypatch, [FakeGpu(uuid="GPU-1")])
    with pytest.raises(NoNvml, match="GPU-2"):
        Gpu.of_uuid("2")
