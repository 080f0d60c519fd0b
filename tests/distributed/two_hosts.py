"""Two hosts on this machine: network namespaces joined by a pair of virtual interfaces.

What ssh would run on a host runs in its namespace. A host is cut off by taking its interface
down: what was sent is lost, and nobody hears that it was.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
_SSH = """\
#!/bin/sh
# HOST COMMAND, as ssh has them; a host's namespace is named after the last part of its address.
exec ip netns exec "{prefix}${{1##*.}}" sh -c "$2"
"""


def why_not() -> str:
    """Why there can be no namespaces here; empty: there can."""
    if shutil.which("ip") is None:
        return "no ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    made = subprocess.run(["ip", "netns", "add", "kimi-try"], capture_output=True, check=False)
    if made.returncode != 0:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "delete", "kimi-try"], check=True)
    return ""


@dataclass(frozen=True)
class Hosts:
    """Addresses of the hosts, and the command that stands for ssh."""

    prefix: str
    addresses: tuple[str, str]
    ssh: Path

    def link(self, host: int, state: str) -> None:
        """Take a host's interface ``down``, or ``up`` again."""
        _ip("-n", self._name(host), "link", "set", INTERFACE, state)

    def processes(self, host: int) -> list[int]:
        """What runs on a host."""
        command = ["ip", "netns", "pids", self._name(host)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    def run(self, host: int, *command: str) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        return subprocess.Popen(["ip", "netns", "exec", self._name(host), *command])

    def _name(self, host: int) -> str:
        return f"{self.prefix}{self.addresses[host].rpartition('.')[2]}"


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two namespaces that reach each other and nothing else."""
    prefix = f"kimi{os.getpid()}-"
    ssh = folder / "ssh"
    ssh.write_text(_SSH.format(prefix=prefix))
    ssh.chmod(0o755)
    hosts = Hosts(prefix, ("10.77.0.1", "10.77.0.2"), ssh)
    ends = (f"ka{os.getpid()}", f"kb{os.getpid()}")
    names = [hosts._name(host) for host in range(2)]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, (name, end) in enumerate(zip(names, ends, strict=True)):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "link", "set", end, "name", INTERFACE)
            _ip("-n", name, "address", "add", f"{hosts.addresses[host]}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
            hosts.link(host, "up")
        yield hosts


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
