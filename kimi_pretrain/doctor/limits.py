"""Shared memory, ulimits, and the port at which ranks meet."""

import os
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from kimi_pretrain.config.launcher import LauncherConfig
from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding

SHM = Path("/dev/shm")
_LEAST_SHM = 1 << 30  # NCCL's and data workers' segments of a node of 8; Docker gives 64 MiB
_LEAST_FILES = 65536  # sockets to thousands of ranks, shards of data, checkpoints
_TORCHRUN = 29500  # its port where nothing else is said

LIMITS = {
    "ulimit -n": resource.RLIMIT_NOFILE,
    "ulimit -l": resource.RLIMIT_MEMLOCK,
    "ulimit -u": resource.RLIMIT_NPROC,
    "ulimit -c": resource.RLIMIT_CORE,
}


def limits() -> dict[str, int]:
    """Soft limits of this process, -1 for none; memory is in bytes."""
    return {name: resource.getrlimit(kind)[0] for name, kind in LIMITS.items()}


def limit_findings(soft: Mapping[str, int]) -> list[Finding]:
    """What a run of thousands of ranks may run into."""
    files = soft["ulimit -n"]
    if 0 <= files < _LEAST_FILES:
        text = f"{files} open files; each rank holds sockets to many others and shards of data"
        return [Finding(NOTE, "ulimit -n", text, f"ulimit -n {_LEAST_FILES} before the launch")]
    return [Finding(OK, "ulimit -n", "unlimited" if files < 0 else str(files))]


def shm_finding(path: Path = SHM) -> Finding:
    """Whether shared memory suffices for the ranks of a host."""
    if not path.is_dir():
        return Finding(BAD, "shared memory", f"there is no {path}", "--ipc=host in a container")
    usage = shutil.disk_usage(path)
    text = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {path}"
    if usage.free < _LEAST_SHM:
        return Finding(BAD, "shared memory", text, "--ipc=host or --shm-size=16g in a container")
    return Finding(OK, "shared memory", text)


def port_finding(launcher: LauncherConfig, environ: Mapping[str, str] = os.environ) -> Finding:
    """Whether the port at which ranks will meet is free; on a job they have met there.

    ``launcher=slurm|hostfile`` says which; otherwise MASTER_PORT does, as for a torchrun by hand.
    """
    if "RANK" in environ:
        where = f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', _TORCHRUN)}"
        return Finding(OK, "port", f"ranks met at {where}")
    fix = "--rdzv-endpoint HOST:ANOTHER, or MASTER_PORT"
    port = environ.get("MASTER_PORT", str(_TORCHRUN))
    if launcher.name != "local":
        fix, port = f"launcher.port={launcher.port + 1}", str(launcher.port)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return Finding(BAD, "port", f"MASTER_PORT={port} is no port", f"MASTER_PORT={_TORCHRUN}")
    with socket.socket() as listener:  # bound, never listening
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            return Finding(NOTE, "port", f"{port} cannot be opened: {error.strerror}", fix)
    return Finding(OK, "port", f"{port} is free")
