"""Bytes on the wire: a network whose only interface is the loopback, and its counter.

Other programs talk over a machine's loopback too, so the ranks that are counted get a network
namespace of their own. The counter knows whole packets: payload, headers and acknowledgements.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_INSIDE = "KIMI_PRETRAIN_BENCHMARK_NETWORK"
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def enter_own_network(*more: str) -> None:
    """Start this command again in a network namespace of its own; return once it runs there.

    Args:
        more: of unshare's options, ``--mount`` for mounts of its own.

    Raises:
        SystemExit: the machine does not allow it.
    """
    if os.environ.get(_INSIDE):
        _raise_loopback()
        return
    unshare = ["unshare", "--net", *more]
    if os.geteuid() != 0:
        unshare.append("--map-root-user")
    if shutil.which("unshare") is None:
        raise SystemExit("this runs in a network namespace: util-linux's unshare is needed")
    attempt = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if attempt.returncode:
        raise SystemExit(
            "this runs in a network namespace, which this machine does not allow "
            f"({attempt.stderr.strip()}): run it as root, or in a privileged container"
        )
    os.environ[_INSIDE] = "1"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns that nobody resolves names in there
    os.execvp(unshare[0], [*unshare, sys.executable, *sys.orig_argv[1:]])


def sent_bytes() -> int:
    """Bytes that the processes of this namespace have sent to each other."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])  # eight columns received, then bytes transmitted
    raise SystemExit("/proc/net/dev lists no loopback interface")


def bytes_of(step: Callable[[], object], barrier: Callable[[], object]) -> int:
    """Bytes that all ranks together send in one ``step``; each calls this at the same time.

    The barriers' own packets, a few hundred bytes a rank, are in the count.
    """
    barrier()
    before = sent_bytes()
    barrier()  # nobody sends before everybody has read the counter
    step()
    barrier()
    after = sent_bytes()
    barrier()
    return after - before


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh22x", b"lo", 0)  # struct ifreq: name, flags
        flags = struct.unpack("16sh22x", fcntl.ioctl(control, _GET_FLAGS, request))[1]
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh22x", b"lo", flags | _UP))
