"""The GPUs of a host as NVIDIA's driver describes them, and what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_pretrain.config.schema import ClusterConfig
from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding
from kimi_pretrain.telemetry.nvml import Gpu, NoNvml, complaints, driver_version

_OUT = "the node out of the job"


def has_gpus(cluster: ClusterConfig) -> bool:
    """Whether a node of the cluster has what ``gpus_per_node`` and ``nics_per_node`` count.

    Of a cluster whose peak nobody knows (``local``) they are defaults, and count nothing.
    """
    return cluster.device == "gpu" and cluster.peak_flops is not None


def look_at_gpus() -> tuple[str, list[dict[str, Any]], str]:
    """The driver's version, every GPU, and why there is none ("": there is)."""
    try:
        return driver_version(), [gpu.describe() for gpu in Gpu.all()], ""
    except NoNvml as error:
        return "", [], str(error)


def gpu_findings(
    gpus: Sequence[Mapping[str, Any]], why_none: str, cluster: ClusterConfig
) -> list[Finding]:
    """What is wrong with the GPUs of a host.

    Args:
        gpus: as ``look_at_gpus`` gives them.
        why_none: likewise.
        cluster: how many a node should have.
    """
    expected = cluster.gpus_per_node if has_gpus(cluster) else 0
    if not gpus:
        text = f"no GPU here ({why_none or 'the driver has none'})"
        if expected:
            fix = "the driver (nvidia-smi), or cluster=local"
            return [Finding(BAD, "GPUs", f"{text}; cluster={cluster.name} has {expected}", fix)]
        return [Finding(NOTE, "GPUs", text)]
    found = []
    if len(gpus) < expected:
        text = f"{len(gpus)} of {expected} are there"
        found.append(
            Finding(BAD, "GPUs", text, "dmesg | grep -i xid, then the node out of the job")
        )
    for index, gpu in enumerate(gpus):
        what = f"GPU {index}"
        found += [Finding(BAD, what, why, _OUT) for why in complaints(gpu)]
        if gpu["nvlinks_active"] < gpu["nvlinks"]:
            text = f"{gpu['nvlinks_active']} of {gpu['nvlinks']} NVLinks are up"
            found.append(Finding(BAD, what, text, "nvidia-smi nvlink -s, nvidia-fabricmanager"))
        if gpu["remapping_failed"]:
            text = "its memory has rows that could not be remapped"
            found.append(Finding(BAD, what, text, _OUT))
        if gpu["mig"]:
            found.append(Finding(NOTE, what, "is divided (MIG)", "nvidia-smi -mig 0"))
        if gpu["persistence_mode"] is False:
            text = "persistence mode is off: a process that starts waits for the driver"
            found.append(Finding(NOTE, what, text, "nvidia-smi -pm 1"))
    kinds = sorted({str(gpu["name"]) for gpu in gpus})
    if len(kinds) > 1:
        found.append(Finding(BAD, "GPUs", f"are of {len(kinds)} kinds: {', '.join(kinds)}"))
    if not found:
        found.append(Finding(OK, "GPUs", f"{len(gpus)} x {kinds[0]}, {_links(gpus[0])}"))
    return found


def _links(gpu: Mapping[str, Any]) -> str:
    if not gpu["nvlinks"]:
        return "no NVLink"
    speed = gpu["nvlink_bytes_per_second"]
    rate = "" if speed is None else f" of {speed / 1e9:.1f} GB/s"
    return f"{gpu['nvlinks']} NVLinks{rate} each, all up"
