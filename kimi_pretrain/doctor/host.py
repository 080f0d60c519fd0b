"""Everything that one host says of itself, looked up by one of its ranks."""

from pathlib import Path
from typing import Any

import torch

from kimi_pretrain.config.schema import Config
from kimi_pretrain.doctor import disk, fabric, gpus, limits, software
from kimi_pretrain.doctor.findings import BAD, OK, Finding
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.plan.parameters import count_parameters

# Of a parameter in a checkpoint: bf16 weight, fp32 master, fp32 momentum.
_CHECKPOINT_BYTES = 10


def look_at_host(config: Config, device: torch.device) -> dict[str, Any]:
    """A host as plain data.

    Returns:
        ``same``: key -> value of what should not differ between hosts; ``facts``: the rest;
        ``findings``: what there is to say, each a list of level, what, text and fix.
    """
    dtype = resolve(config.precision)
    driver, cards, why_none = gpus.look_at_gpus()
    ports, soft = fabric.rdma_ports(), limits.limits()
    kernels = software.kernels(config.kernels, device, dtype)
    checkpoint = count_parameters(config.model).total * _CHECKPOINT_BYTES
    run_disk, measured = disk.disk_finding(
        Path(config.run_dir), checkpoint, config.schedule.keep_checkpoints
    )
    findings = [
        *gpus.gpu_findings(cards, why_none, config.cluster),
        _device_finding(device, len(cards)),
        *fabric.fabric_findings(ports, config.cluster, soft["ulimit -l"]),
        limits.shm_finding(),
        *limits.limit_findings(soft),
        limits.port_finding(config.launcher),
        run_disk,
    ]
    same = {
        **{f"version of {name}": value for name, value in software.versions().items()},
        **{f"kernel of {op}": choice for op, choice in kernels.items()},
        **{f"variable {name}": value for name, value in software.environment().items()},
        **{name: str(value) for name, value in soft.items()},
        "driver": driver or "none",
        "number of GPUs": str(len(cards)),
        "number of RDMA ports": str(len(ports)),
    }
    facts = {
        "device": str(device),
        "dtype": str(dtype),
        "gpus": cards,
        "rdma": fabric.port_facts(ports),
        "ethernet": fabric.ethernet(),
        "disk": None if measured is None else vars(measured),
    }
    return {
        "same": same,
        "facts": facts,
        "findings": [[f.level, f.what, f.text, f.fix] for f in findings if f.text],
    }


def _device_finding(device: torch.device, cards: int) -> Finding:
    """Whether torch uses what the driver has."""
    if device.type == "cpu" and cards:
        text = f"torch {torch.__version__} computes on the CPU beside {cards} GPUs"
        return Finding(BAD, "torch", text, "a build of torch for CUDA")
    return Finding(OK, "torch", f"{torch.__version__} computes on {device.type}")
