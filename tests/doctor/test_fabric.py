"""RDMA ports, from a made-up /sys/class."""

from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.doctor.fabric import ethernet, fabric_findings, rdma_ports
from kimi_pretrain.doctor.findings import BAD, NOTE, OK

UNLIMITED = -1
H800 = compose(["cluster=h800"]).cluster
LOCAL = compose([]).cluster


def device(
    root: Path, name: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)"
) -> None:
    port = root / "infiniband" / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(state + "\n")
    (port / "rate").write_text(rate + "\n")
    (port / "link_layer").write_text("Ethernet\n")
    (port.parent.parent / "fw_ver").write_text("28.39.2048\n")


def test_ports_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    """Catches a state read with its number, and gigabits with their name."""
    device(tmp_path, "mlx5_0")
    (port,) = rdma_ports(tmp_path)
    assert (port.device, port.port, port.layer) == ("mlx5_0", "1", "Ethernet")
    assert (port.state, port.active, port.gigabits) == ("ACTIVE", True, 400.0)
    assert port.firmware == "28.39.2048"


def test_eight_good_ports_are_fit(tmp_path: Path) -> None:
    """Catches an alarm on a healthy node."""
    for number in range(8):
        device(tmp_path, f"mlx5_{number}")
    (found,) = fabric_findings(rdma_ports(tmp_path), H800, UNLIMITED)
    assert (found.level, found.text) == (OK, "8 up at 400 Gb/s, Ethernet")


def test_a_port_that_is_down_is_named(tmp_path: Path) -> None:
    """Catches a node that trains on seven of eight rails, unnoticed."""
    for number in range(7):
        device(tmp_path, f"mlx5_{number}")
    device(tmp_path, "mlx5_7", state="1: DOWN", rate="10 Gb/sec (4X SDR)")
    down, few = fabric_findings(rdma_ports(tmp_path), H800, UNLIMITED)
    assert (down.level, down.text) == (BAD, "mlx5_7 port 1 is DOWN")
    assert (few.level, few.text) == (BAD, "7 are up and cluster=h800 has 8 a node")


def test_a_port_at_half_its_rate_is_named(tmp_path: Path) -> None:
    """Catches a cable that came up at 200 Gb/s: on any cluster where the other ports say so, and
    where all ports are slow, by what the cluster has."""
    device(tmp_path, "mlx5_0")
    device(tmp_path, "mlx5_1", rate="200 Gb/sec (2X NDR)")
    (slow,) = fabric_findings(rdma_ports(tmp_path), LOCAL, UNLIMITED)
    assert (slow.level, slow.text) == (BAD, "mlx5_1 port 1 runs at 200 of 400 Gb/s")
    alone = [port for port in rdma_ports(tmp_path) if port.gigabits == 200.0] * 8
    assert {f.text for f in fabric_findings(alone, H800, UNLIMITED)} == {slow.text}


def test_memory_that_cannot_be_locked_is_told(tmp_path: Path) -> None:
    """Catches NCCL that falls back to sockets because registration fails."""
    device(tmp_path, "mlx5_0")
    (found,) = fabric_findings(rdma_ports(tmp_path), LOCAL, 65536)
    assert (found.level, found.what) == (BAD, "ulimit -l")


@pytest.mark.parametrize(("cluster", "level"), [(LOCAL, NOTE), (H800, BAD)])
def test_no_device_matters_where_there_should_be_some(
    tmp_path: Path, cluster: object, level: str
) -> None:
    """Catches a laptop that is not fit, and a node of eight NICs without one that is."""
    (found,) = fabric_findings(rdma_ports(tmp_path), cluster, 65536)  # type: ignore[arg-type]
    assert found.level == level


def test_ethernet_links_that_are_up(tmp_path: Path) -> None:
    """Catches the loopback told as a link, and a virtual one without a speed that ends it all."""
    for name, state, speed in (("lo", "unknown", ""), ("eth0", "up", "100000"), ("veth", "up", "")):
        link = tmp_path / "net" / name
        link.mkdir(parents=True)
        (link / "operstate").write_text(state)
        (link / "speed").write_text(speed)
    assert ethernet(tmp_path) == {"eth0": 100000, "veth": -1}
