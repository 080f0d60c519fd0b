"""How the ranks of a run are started: ``launcher=local|slurm|hostfile`` (docs/launch.md).

The ranks themselves never see these keys: a command line that starts them is theirs without
its ``launcher`` part, so that a run may go on under another launcher.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.names import CONTAINER_RUNTIMES, LAUNCHERS
from kimi_pretrain.config.nearest import nearest_name

# Asks for no password; a host that does not come up is given up after 10 seconds, one that is cut
# off after 15 to 20: ssh itself would wait for hours (ssh_config(5)).
SSH = (
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)


@dataclass
class ContainerConfig:
    """The image that ranks run in; without one they run on the node itself."""

    image: str | None = None
    runtime: str = "pyxis"  # pyxis (srun's plugin for enroot) | apptainer
    mounts: list[str] = field(default_factory=list)  # SOURCE:TARGET or SOURCE:TARGET:FLAGS


@dataclass
class LauncherConfig:
    """One way to start ranks. Keys of another launcher than ``name`` stay at their defaults."""

    name: str = "local"  # local | slurm | hostfile
    check_memory: bool = True  # before ranks start, where the cluster's facts are known (plan)
    # slurm and hostfile
    ranks_per_node: int | None = None  # null: cluster.gpus_per_node, or the hostfile's slots
    port: int = 29400  # of the rendezvous, on the first node
    address: str | None = None  # where the other nodes reach the first; null: its name
    max_restarts: int = 3  # of all ranks within a job, each from the last checkpoint
    environment: dict[str, str] = field(default_factory=dict)  # over the cluster's
    python: str | None = None  # on the nodes; null: this one, in an image python3
    # slurm
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str | None = None  # days-hours:minutes:seconds, as sbatch has it; null: the partition's
    stop_seconds: int = 600  # before the time limit: checkpoint, end, wait in the queue again
    requeue: bool = True
    exclusive: bool = True  # whole nodes
    options: dict[str, str] = field(default_factory=dict)  # more of sbatch's, as switches: 1
    container: ContainerConfig = field(default_factory=ContainerConfig)
    # hostfile
    hostfile: str | None = None  # lines of `HOST slots=N`
    ssh: list[str] = field(default_factory=lambda: list(SSH))


_SLURM = (
    *("partition", "account", "qos", "reservation", "constraint", "time", "stop_seconds"),
    *("requeue", "exclusive", "options", "container"),
)
_HOSTFILE = ("hostfile", "ssh")
_SEVERAL_NODES = ("ranks_per_node", "port", "address", "max_restarts", "environment", "python")
_FOREIGN = {
    "local": (*_SEVERAL_NODES, *_SLURM, *_HOSTFILE),
    "slurm": _HOSTFILE,
    "hostfile": _SLURM,
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_LIST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+,:/@&|*\[\]()-]*")  # gpu&ib, node[1-4]
_OPTION = re.compile(r"[a-z][a-z-]*")
_TIME = re.compile(r"\d+(-\d+(:\d+(:\d+)?)?|:\d+(:\d+)?)?|UNLIMITED")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOUNT = re.compile(r"/[^:,]*:/[^:,]*(:[a-z+-]+)?")
_PROGRAM = re.compile(r"[^-=][^=]*")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LONGEST_STOP_SECONDS = 65535  # Slurm's


def validate_launcher(launcher: LauncherConfig) -> None:
    """Accept ``launcher``, or raise ConfigError for the first rule it breaks."""
    _one_of("name", launcher.name, LAUNCHERS)
    _refuse_foreign(launcher)
    if launcher.ranks_per_node is not None:
        _between("ranks_per_node", launcher.ranks_per_node, 1, 4096)
    _between("port", launcher.port, 1024, 65535)
    _between("max_restarts", launcher.max_restarts, 0, 1000)
    _between("stop_seconds", launcher.stop_seconds, 1, LONGEST_STOP_SECONDS)
    refuse_environment("launcher.environment", launcher.environment)
    for key in ("partition", "account", "qos", "reservation", "constraint"):
        text = getattr(launcher, key)
        if text is not None:
            _matches(key, text, _LIST, "letters, digits and . _ + , : / @ & | * [ ] ( ) -", "gpu")
    if launcher.address is not None:
        rule = "a host's name or address"
        _matches("address", launcher.address, _NAME, rule, "node-0.cluster")
    if launcher.time is not None:
        rule = "minutes, minutes:seconds, hours:minutes:seconds or days-hours:minutes:seconds"
        _matches("time", launcher.time, _TIME, rule, "1-00:00:00")
        limit = seconds_of(launcher.time)
        rule = f"a job stops so long before launcher.time={launcher.time} and must have begun"
        nearest = f"launcher.stop_seconds={min(600, limit // 2):.0f}"
        late = launcher.stop_seconds < limit
        _require(late, "stop_seconds", launcher.stop_seconds, rule, nearest)
    for name, text in launcher.options.items():
        _matches("options", name, _OPTION, "one of sbatch's options without its --", "switches: 1")
        if text:
            _matches(f"options.{name}", text, _LIST, "as sbatch has it, without spaces", "1")
    for key in ("python", "hostfile"):
        text = getattr(launcher, key)
        if text is not None:
            refuse_unprintable(f"launcher.{key}", text)
    if launcher.python is not None:  # one of srun's words, and of env's
        rule = "a program's name or path, without a - before it and without ="
        _matches("python", launcher.python, _PROGRAM, rule, "python3")
    _container(launcher.container)
    rule = "a command that runs another on a host"
    _require(bool(launcher.ssh), "ssh", launcher.ssh, rule, "launcher.ssh=[ssh]")
    for word in launcher.ssh:
        refuse_unprintable("launcher.ssh", word)


def seconds_of(time: str) -> float:
    """A time limit of Slurm's in seconds: minutes, or parts with ``:``, after days and ``-``."""
    if time == "UNLIMITED":
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours:minutes:seconds, the last ones left out
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # minutes; minutes:seconds; hours:minutes:seconds
        hours, minutes, seconds = [0, *parts, 0, 0][:3] if len(parts) < 3 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def refuse_environment(key: str, environment: Mapping[str, str]) -> None:
    """Raise ConfigError for a variable's name or value that cannot be exported in one line."""
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            rule = "a variable's name has letters, digits and _"
            raise ConfigError(key, name, rule, f"+{key}.NCCL_DEBUG=INFO")
        refuse_unprintable(f"{key}.{name}", value)


def refuse_unprintable(key: str, text: str) -> None:
    """Raise ConfigError for what a line of a script, or a person, could not read as it is."""
    if _UNPRINTABLE.search(text):
        readable = _UNPRINTABLE.sub(" ", text).strip() or "text"
        rule = "it is one line without control characters"
        raise ConfigError(key, text, rule, f"{key}={readable}")


def _container(container: ContainerConfig) -> None:
    _one_of("container.runtime", container.runtime, CONTAINER_RUNTIMES)
    if container.image is not None:
        refuse_unprintable("launcher.container.image", container.image)
        rule = "an image's file or reference"
        named = container.image != "" and not container.image.startswith("-")
        fix = "launcher.container.image=/images/train.sqsh"
        _require(named, "container.image", container.image, rule, fix)
    rule = "mounts are of an image, and there is none"
    fix = "launcher.container.image=/images/train.sqsh"
    needless = container.image is None and bool(container.mounts)
    _require(not needless, "container.mounts", container.mounts, rule, fix)
    for mount in container.mounts:
        refuse_unprintable("launcher.container.mounts", mount)
        rule = "SOURCE:TARGET or SOURCE:TARGET:FLAGS, absolute paths without , and :"
        _matches("container.mounts", mount, _MOUNT, rule, "[/data:/data:ro]")


def _refuse_foreign(launcher: LauncherConfig) -> None:
    """A key that the chosen launcher would not read is a mistake, not a wish."""
    plain = LauncherConfig()
    for item in fields(LauncherConfig):
        foreign = item.name in _FOREIGN[launcher.name]
        value = getattr(launcher, item.name)
        if foreign and value != getattr(plain, item.name):
            of = "slurm" if item.name in _SLURM + _SEVERAL_NODES else "hostfile"
            rule = f"launcher={launcher.name} does not read it"
            raise ConfigError(f"launcher.{item.name}", value, rule, f"launcher={of}")


def _matches(key: str, text: str, pattern: re.Pattern[str], rule: str, usual: str) -> None:
    fix = f"launcher.{key}={usual}"
    _require(pattern.fullmatch(text) is not None, key, text, rule, fix)


def _between(key: str, value: int, least: int, most: int) -> None:
    nearest = min(max(value, least), most)
    rule = f"it is at least {least} and at most {most}"
    _require(least <= value <= most, key, value, rule, f"launcher.{key}={nearest}")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    rule = f"it is one of {', '.join(choices)}"
    _require(value in choices, key, value, rule, f"launcher.{key}={nearest_name(value, choices)}")


def _require(holds: bool, key: str, value: object, rule: str, fix: str) -> None:
    if not holds:
        raise ConfigError(f"launcher.{key}", value, rule, fix)
