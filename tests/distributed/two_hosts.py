"""Two hosts on this machine: network namespaces joined by a pair of virtual interfaces.

What ssh would run on a host runs in its namespace, or an sshd does in each. A host is cut off by
taking its interface down: what was sent is lost, and nobody hears that it was.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.config.launcher import SSH

INTERFACE = "eth0"
_SSH = """\
#!/bin/sh
# HOST COMMAND, as ssh has them; a host's namespace is named after the last part of its address.
exec ip netns exec "{prefix}${{1##*.}}" sh -c "$2"
"""
SSHD = Path("/usr/sbin/sshd")
_SERVER = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
_CLIENT = """\
User root
IdentityFile {folder}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
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
        return subprocess.Popen([*self.on(host), *command])

    def on(self, host: int) -> list[str]:
        """The words before a command that is to run on a host."""
        return ["ip", "netns", "exec", self._name(host)]

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


@contextmanager
def ssh_servers(hosts: Hosts, folder: Path) -> Iterator[list[str]]:
    """An sshd on each host, with keys of their own; yields words before ssh's on the first host,
    and after them."""
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's own, which Debian makes at boot
    for name in ("host_key", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder))
    with ExitStack() as stack:
        for host, address in enumerate(hosts.addresses):
            conf = folder / f"sshd_config-{host}"
            conf.write_text(_SERVER.format(folder=folder, address=address))
            server = hosts.run(host, str(SSHD), "-D", "-e", "-f", str(conf))
            stack.callback(server.wait)
            stack.callback(server.terminate)
        yield [*hosts.on(0), SSH[0], "-F", f"{folder}/ssh_config", *SSH[1:]]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
