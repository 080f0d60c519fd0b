"""A hostfile as data: lines of ``HOST slots=N``, as Open MPI and DeepSpeed read them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.launch.nodes import Nodes

_LINE = re.compile(r"(?P<host>([a-z_][\w-]*@)?[A-Za-z0-9][\w.-]*)(\s+slots=(?P<slots>[0-9]{1,4}))?")
_RULE = "each line is HOST slots=N, HOST a name or an IPv4 address, USER@ before it if need be"


@dataclass(frozen=True)
class Host:
    """Where ssh goes, and how many ranks the host takes; None: the line does not say."""

    target: str
    slots: int | None

    @property
    def name(self) -> str:
        """Its name or address for the other hosts."""
        return self.target.rpartition("@")[2]


def parse(text: str, what: str) -> list[Host]:
    """The hosts of a file's ``text``; empty lines and what follows a ``#`` say nothing.

    Raises:
        ConfigError: a line that is none, a host named twice, or no host at all. ``what``
            names the file.
    """
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        place = f"{what}, line {number}"
        if match is None:
            raise ConfigError(place, line, _RULE, "node-0 slots=8")
        slots = int(match["slots"]) if match["slots"] is not None else None
        host = Host(match["host"], slots)
        if slots == 0:
            raise ConfigError(place, line, "a host takes at least one rank", "slots=8")
        if host.name in {other.name for other in hosts}:
            raise ConfigError(place, host.name, "a host is named once", "its slots in one line")
        hosts.append(host)
    if not hosts:
        raise ConfigError(what, "no host", _RULE, "node-0 slots=8")
    return hosts


def read(path: str | None) -> list[Host]:
    """The hosts of the file at ``path``.

    Raises:
        ConfigError: no file is named, it cannot be read, or as ``parse``.
    """
    key = "launcher.hostfile"
    if path is None:
        rule = "a file names the hosts that ssh reaches"
        raise ConfigError(key, None, rule, f"{key}=hosts, with lines of HOST slots=N")
    try:
        return parse(Path(path).read_text(encoding="utf-8"), f"{key} {path}")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(key, path, f"a text file ({why})", f"{key}=hosts") from error


def place(hosts: Sequence[Host], world: int, each: int | None) -> tuple[list[Host], Nodes]:
    """The hosts that ``world`` ranks take, from the first on, and as how many nodes.

    Args:
        hosts: of the file.
        world: number of ranks.
        each: ranks on a host, where the configuration says; else the file's slots.

    Raises:
        ConfigError: nothing says how many ranks a host takes, hosts take different numbers,
            or the ranks do not fill whole hosts of the file.
    """
    given = {each} if each is not None else {host.slots for host in hosts}
    if len(given) > 1:
        rule = "every node of a run has as many ranks"
        said = ", ".join(f"{host.name} {host.slots or '?'}" for host in hosts)
        raise ConfigError("slots of the hostfile", said, rule, "launcher.ranks_per_node=8")
    (ranks,) = given
    if ranks is None:
        rule = "how many ranks a host takes is in its line or in launcher.ranks_per_node"
        raise ConfigError("slots of the hostfile", None, rule, "launcher.ranks_per_node=8")
    ranks = min(ranks, world)
    count, rest = divmod(world, ranks)
    if rest or count > len(hosts):
        rule = f"the ranks of a run fill whole hosts of {ranks}, and the file names {len(hosts)}"
        fix = f"{len(hosts) * ranks} ranks, or {-(-world // ranks)} hosts"
        raise ConfigError("parallel.pp x parallel.dp", f"{world} ranks", rule, fix)
    return list(hosts[:count]), Nodes(count, ranks)
