"""A stand-in for the module ``pynvml``: as many GPUs as a test says, each as it says."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class FakeGpu:
    """One card; ``unsupported`` names the functions that it does not offer."""

    uuid: str = "GPU-0"
    power: int = 640_000  # mW
    temperature: int = 60
    clock: int = 1755  # MHz
    reasons: int = 0x4
    ecc: int = 0
    links: tuple[bool, ...] = (True,) * 8
    lost: bool = False
    unsupported: set[str] = field(default_factory=set)


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801 - as pynvml names it
    pass


class NVMLError_NoPermission(NVMLError):  # noqa: N801
    pass


class NVMLError_InvalidArgument(NVMLError):  # noqa: N801
    pass


def install(
    monkeypatch: pytest.MonkeyPatch, gpus: list[FakeGpu], driver: str | None = "570.86"
) -> None:
    """Make ``import pynvml`` give this; without a ``driver`` it finds none."""
    module: Any = ModuleType("pynvml")
    module.__spec__ = SimpleNamespace()
    module.NVMLError = NVMLError
    module.NVMLError_NotSupported = NVMLError_NotSupported
    module.NVMLError_NoPermission = NVMLError_NoPermission
    module.NVMLError_InvalidArgument = NVMLError_InvalidArgument
    module.NVML_TEMPERATURE_GPU, module.NVML_CLOCK_SM = 0, 1
    module.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, module.NVML_VOLATILE_ECC = 1, 0
    module.NVML_NVLINK_MAX_LINKS = 18
    module.NVML_SUCCESS, module.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = 0, 90

    def init() -> None:
        if driver is None:
            raise NVMLError("NVML Shared Library Not Found")

    def by_uuid(uuid: str) -> FakeGpu:
        for gpu in gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError("Not Found")

    def link_state(gpu: FakeGpu, link: int) -> int:
        if link >= len(gpu.links):
            raise NVMLError_InvalidArgument("Invalid Argument")
        return int(gpu.links[link])

    asked = {
        "nvmlDeviceGetName": lambda gpu: "NVIDIA H800",
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=80 << 30),
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda gpu, clock: 1980,
        "nvmlDeviceGetPersistenceMode": lambda gpu: 1,
        "nvmlDeviceGetMigMode": lambda gpu: [0, 0],
        "nvmlDeviceGetEccMode": lambda gpu: [1, 1],
        "nvmlDeviceGetRemappedRows": lambda gpu: (0, 0, 0, 0),
        "nvmlDeviceGetPowerUsage": lambda gpu: gpu.power,
        "nvmlDeviceGetTemperature": lambda gpu, sensor: gpu.temperature,
        "nvmlDeviceGetClockInfo": lambda gpu, clock: gpu.clock,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: gpu.reasons,
        "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, counter: gpu.ecc,
        "nvmlDeviceGetNvLinkState": link_state,
        "nvmlDeviceGetFieldValues": lambda gpu, fields: [
            SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=26562))
        ],
    }

    def answering(name: str, answer: Any) -> Any:
        def ask(gpu: FakeGpu, *arguments: Any) -> Any:
            if gpu.lost:
                raise NVMLError("GPU is lost")
            if name in gpu.unsupported:
                raise NVMLError_NotSupported("Not Supported")
            return answer(gpu, *arguments)

        return ask

    module.nvmlInit = init
    module.nvmlSystemGetDriverVersion = lambda: driver
    module.nvmlDeviceGetCount = lambda: len(gpus)
    module.nvmlDeviceGetHandleByIndex = lambda index: gpus[index]
    module.nvmlDeviceGetHandleByUUID = by_uuid
    for name, answer in asked.items():
        setattr(module, name, answering(name, answer))
    monkeypatch.setitem(sys.modules, "pynvml", module)
