"""Ranks on links of a fixed rate: network namespaces joined by veth links, shaped by tc's tbf.

Each rank has a namespace and an interface ``eth0``; the other ends hang on one bridge. Both
directions are shaped, so a rank neither sends nor receives faster than the rate, as with a network
card of that speed. Everything lives in namespaces of the benchmark's own, network and mounts, and
ends with it.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.loopback import enter_own_network

_CLONE_NEWNET = 0x40000000


def enter_shaped_network(ranks: int, megabits: float) -> None:
    """Start this command again beside ``ranks`` namespaces whose links have that rate.

    Raises:
        SystemExit: the machine does not allow it.
    """
    enter_own_network("--mount")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise SystemExit(f"links are made and shaped by iproute2: {tool} is needed")
    _run("mount -t tmpfs tmpfs /run")  # ip keeps namespaces' names there; these vanish with us
    _run("ip link add switch type bridge")
    _run("ip link set switch up")
    for rank in range(ranks):
        name, port = f"rank{rank}", f"port{rank}"
        _run(f"ip netns add {name}")
        _run(f"ip link add {port} type veth peer name eth0 netns {name}")
        _run(f"ip link set {port} master switch up")
        _run(f"ip -n {name} addr add {_address(rank)}/24 dev eth0")
        _run(f"ip -n {name} link set eth0 up")
        _run(f"ip -n {name} link set lo up")
        shaping = f"root tbf rate {megabits}mbit burst 16kb latency 1s"
        _run(f"tc -n {name} qdisc add dev eth0 {shaping}")
        _run(f"tc qdisc add dev {port} {shaping}")


def join_network(rank: int) -> None:
    """Move this rank into its namespace, before it knows anybody."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/rank{rank}").open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace of rank {rank}")
    os.environ |= {"MASTER_ADDR": _address(0), "GLOO_SOCKET_IFNAME": "eth0"}


def _address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
