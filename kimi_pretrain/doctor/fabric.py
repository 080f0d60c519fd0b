"""InfiniBand and RoCE devices and Ethernet links, as the kernel tells of them in /sys/class."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kimi_pretrain.config.schema import ClusterConfig
from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding
from kimi_pretrain.doctor.gpus import has_gpus

SYS = Path("/sys/class")


@dataclass(frozen=True)
class Port:
    """One port of an RDMA device."""

    device: str
    port: str
    layer: str  # InfiniBand, or Ethernet: RoCE
    state: str  # ACTIVE, DOWN, INIT, ...
    gigabits: float
    firmware: str

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"


def rdma_ports(root: Path = SYS) -> list[Port]:
    """Every port of every RDMA device; none where there is no such device."""
    return [
        Port(
            device=port.parent.parent.name,
            port=port.name,
            layer=_read(port / "link_layer"),
            state=_read(port / "state").rpartition(": ")[2],
            gigabits=_gigabits(_read(port / "rate")),
            firmware=_read(port.parent.parent / "fw_ver"),
        )
        for port in sorted(root.glob("infiniband/*/ports/*"))
    ]


def ethernet(root: Path = SYS) -> dict[str, int]:
    """Megabits a second of every link that is up; -1 where the driver does not say."""
    links = {}
    for link in sorted(root.glob("net/*")):
        if link.name != "lo" and _read(link / "operstate") == "up":
            speed = _read(link / "speed")
            links[link.name] = int(speed) if speed.isdecimal() else -1
    return links


def fabric_findings(ports: Sequence[Port], cluster: ClusterConfig, memlock: int) -> list[Finding]:
    """What is wrong with the RDMA ports of a host.

    Args:
        ports: of one host.
        cluster: what a node should have; only one that names a NIC's bandwidth expects any.
        memlock: bytes that a process may lock; -1: without limit.
    """
    expected = cluster.nics_per_node if has_gpus(cluster) else 0
    if not ports:
        text = "none here: ranks of other hosts are reached over TCP"
        if expected:
            text = f"none here, and cluster={cluster.name} has {expected} a node"
        return [Finding(BAD if expected else NOTE, "RDMA devices", text)]
    found = []
    for port in ports:
        if not port.active:
            text = f"{port.device} port {port.port} is {port.state}"
            found.append(Finding(BAD, "RDMA link", text, "its cable, or NCCL_IB_HCA without it"))
    active = [port for port in ports if port.active]
    fastest = max((port.gigabits for port in active), default=0.0)
    wanted = 8e-9 * (cluster.nic_bandwidth or 0.0) if expected else fastest  # Gb/s
    for port in active:
        if port.gigabits < wanted:
            text = f"{port.device} port {port.port} runs at {port.gigabits:g} of {wanted:g} Gb/s"
            found.append(Finding(BAD, "RDMA link", text, "its cable or switch port"))
    if len(active) < expected:
        text = f"{len(active)} are up and cluster={cluster.name} has {expected} a node"
        found.append(Finding(BAD, "RDMA devices", text, "the missing ones"))
    if memlock >= 0:
        text = f"{memlock} bytes may be locked and RDMA registers gigabytes"
        found.append(Finding(BAD, "ulimit -l", text, "memlock unlimited in limits.conf"))
    if not found:
        layers = " and ".join(sorted({port.layer for port in active}))
        found = [Finding(OK, "RDMA devices", f"{len(active)} up at {fastest:g} Gb/s, {layers}")]
    return found


def port_facts(ports: Sequence[Port]) -> list[dict[str, object]]:
    """The ports as plain data."""
    return [asdict(port) for port in ports]


def _read(path: Path) -> str:
    """A file of sysfs; some exist and cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _gigabits(rate: str) -> float:
    """Of a rate such as "400 Gb/sec (4X NDR)"; 0 where there is none."""
    number = re.match(r"[\d.]+", rate)
    return float(number[0]) if number else 0.0
