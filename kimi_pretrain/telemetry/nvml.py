"""What NVIDIA's driver says of a GPU: power, temperature, clocks, throttling, ECC, NVLink.

Through nvidia-ml-py (module ``pynvml``), imported only where a GPU is to be read. A card that
does not offer a value leaves it out (nan in a ``Gpu.read``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kimi_pretrain.telemetry.breakdown import Seat, spread

# Of ``Gpu.read``, in base units.
READINGS = (
    "power_watts",
    "temperature_celsius",
    "sm_clock_hertz",
    "throttle_reasons",  # bits, as in THROTTLES
    "ecc_uncorrected_errors",  # since the driver was loaded
    "failed",  # 1.0: the driver could not say
)

# Bits of nvmlClocksEventReasons (nvml.h). Below full clocks by design: idle, application
# clocks, sync boost, display, and the power cap, at which a GPU under load usually is.
THROTTLES = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability limit",
}
ALARMING = 0x008 | 0x020 | 0x040 | 0x080 | 0x200 | 0x400


class NoNvml(Exception):
    """There is no driver to ask, or no package to ask it with; says which."""


class Gpu:
    """One GPU, by its handle of ``pynvml``."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def of_uuid(cls, uuid: str) -> "Gpu":
        """The GPU that CUDA calls by this UUID, whatever CUDA_VISIBLE_DEVICES says.

        Raises:
            NoNvml: no driver, no package, or no such GPU.
        """
        nvml = open_nvml()
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError as error:
            raise NoNvml(f"NVML knows no {name}: {error}") from error

    @classmethod
    def all(cls) -> "list[Gpu]":
        """Every GPU of this host.

        Raises:
            NoNvml: no driver, or no package.
        """
        nvml = open_nvml()
        return [
            cls(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(nvml.nvmlDeviceGetCount())
        ]

    def read(self) -> dict[str, float]:
        """``READINGS`` now."""
        nvml, gpu = self._nvml, self._handle
        asked: dict[str, Callable[[], float]] = {
            "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(
                gpu, nvml.NVML_TEMPERATURE_GPU
            ),
            "sm_clock_hertz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM) * 1e6,
            "throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
            "ecc_uncorrected_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
                gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        }
        try:
            values = {name: self._value(ask) for name, ask in asked.items()}
        except nvml.NVMLError:  # a GPU that fell off the bus, a driver that hangs
            return dict.fromkeys(asked, math.nan) | {"failed": 1.0}
        return {
            name: math.nan if value is None else float(value) for name, value in values.items()
        } | {"failed": 0.0}

    def describe(self) -> dict[str, Any]:
        """What the card is and how it is set up, its readings among it.

        Raises:
            NoNvml: the driver cannot say.
        """
        nvml, gpu = self._nvml, self._handle
        asked: dict[str, Callable[[], Any]] = {
            "name": lambda: nvml.nvmlDeviceGetName(gpu),
            "uuid": lambda: nvml.nvmlDeviceGetUUID(gpu),
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            "max_sm_clock_hertz": lambda: (
                nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM) * 1e6
            ),
            "persistence_mode": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(gpu)),
            "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(gpu)[0]),
            "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
            "remapping_failed": lambda: bool(nvml.nvmlDeviceGetRemappedRows(gpu)[3]),
        }
        try:
            told = {name: self._value(ask) for name, ask in asked.items()}
            told["nvlinks_active"], told["nvlinks"] = self._links()
            told["nvlink_bytes_per_second"] = self._link_speed()
        except nvml.NVMLError as error:
            raise NoNvml(f"the driver cannot describe a GPU: {error}") from error
        return told | self.read()

    def _links(self) -> tuple[int, int]:
        """NVLinks that are up, and all that the card has."""
        states = [
            self._value(partial(self._nvml.nvmlDeviceGetNvLinkState, self._handle, link))
            for link in range(self._nvml.NVML_NVLINK_MAX_LINKS)
        ]
        present = [state for state in states if state is not None]
        return sum(bool(state) for state in present), len(present)

    def _link_speed(self) -> float | None:
        """Of one NVLink that is up, one way."""
        nvml = self._nvml
        field = nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON
        answers = self._value(partial(nvml.nvmlDeviceGetFieldValues, self._handle, [field]))
        if not answers or answers[0].nvmlReturn != nvml.NVML_SUCCESS:
            return None
        return float(answers[0].value.uiVal) * 1e6

    def _value(self, ask: Callable[[], Any]) -> Any:
        """What the driver says, None where the card or the user's rights do not offer it."""
        nvml = self._nvml
        try:
            return ask()
        except (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_InvalidArgument,  # a link that this card does not have
        ):
            return None


def open_nvml() -> Any:
    """The module ``pynvml``, initialised.

    Raises:
        NoNvml: it is not installed, or there is no driver.
    """
    if find_spec("pynvml") is None:
        raise NoNvml("nvidia-ml-py is not installed (pip install nvidia-ml-py)")
    nvml: Any = import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoNvml(f"no NVIDIA driver answers: {error}") from error
    return nvml


def driver_version() -> str:
    """Of NVIDIA's kernel driver.

    Raises:
        NoNvml: there is none to ask.
    """
    return str(open_nvml().nvmlSystemGetDriverVersion())


def device_comparison(
    readings: Sequence[Mapping[str, float]], seats: Sequence[Seat]
) -> dict[str, Any]:
    """The spread of every reading over ranks, and which GPUs are not well, with their hosts.

    Args:
        readings: [ranks] of ``READINGS``; nan where there is none.
        seats: [ranks].

    Returns:
        ``devices`` by reading as smallest, median and largest, and ``unhealthy``; nothing
        where no rank has a GPU.
    """
    devices = {}
    for name in ("power_watts", "temperature_celsius", "sm_clock_hertz"):
        known = [each[name] for each in readings if not math.isnan(each[name])]
        if known:
            devices[name] = spread(known)
    unhealthy = [
        {"rank": rank, "host": seats[rank].host, "why": why}
        for rank, each in enumerate(readings)
        if (why := complaints(each))
    ]
    return {"devices": devices, "unhealthy": unhealthy} if devices or unhealthy else {}


def complaints(reading: Mapping[str, float]) -> list[str]:
    """What is wrong with a GPU by its ``READINGS``, in words."""
    if reading["failed"] == 1.0:
        return ["the driver gave no answer"]
    why = []
    if not math.isnan(reading["throttle_reasons"]):
        bits = int(reading["throttle_reasons"]) & ALARMING
        why += [name for bit, name in THROTTLES.items() if bits & bit]
    if reading["ecc_uncorrected_errors"] > 0:
        why.append(f"{reading['ecc_uncorrected_errors']:.0f} uncorrected ECC errors")
    return why
