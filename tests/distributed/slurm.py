"""A Slurm of one's own: munged, slurmctld and as many slurmd as nodes, all on this machine.

Everything lies in a folder of its own and listens on loopback; the daemons are children of
the test and end with it. Nodes are virtual: one machine, one slurmd each.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def why_not() -> str:
    """Why no Slurm can be started here; empty: it can."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge (`make test-slurm` does)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as their users, and needs root"


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_until(holds: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Look until it holds; ``what`` says in which state it was given up."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={control}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=debug Nodes=n[0-{last}] Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A running Slurm; ``variables`` make its commands reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.variables, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, by Slurm's names."""
        text = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def answers(self) -> bool:
        """Whether slurmctld can be asked."""
        ping = ["scontrol", "ping"]
        done = subprocess.run(ping, env=self.variables, capture_output=True, text=True, check=False)
        return "UP" in done.stdout

    def idle(self) -> int:
        """The number of nodes on which nothing runs or is being cleaned up."""
        return int(self.ask("sinfo", "--noheader", "--states=idle", "--format=%D") or "0")

    def story(self) -> str:
        """What the daemons wrote last."""
        names = ("*.out", "slurmctld.log", "slurmd-*.log", "munge.log")
        files = [file for name in names for file in sorted(self.folder.glob(name))]
        return "\n".join(f"== {file.name}\n{file.read_text()[-800:]}" for file in files)

    def state(self, number: str) -> str:
        """A job's state in Slurm's words."""
        return self.job(number)["JobState"]


@contextmanager
def running_slurm(nodes: int) -> Iterator[Slurm]:
    """A Slurm of so many nodes, n0, n1, ..., all idle."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 108 bytes
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _configure(folder, nodes)
        slurm = Slurm(folder)
        socket_file = folder / "munge.socket"
        stack.enter_context(_daemon(_munged(folder), folder / "munged.out", os.environ))
        wait_until(socket_file.exists, 20, slurm.story)
        daemons = [
            ["slurmctld", "-D", "-i"],
            *(["slurmd", "-D", "-N", f"n{i}"] for i in range(nodes)),
        ]
        for number, command in enumerate(daemons):
            out = folder / f"daemon-{number}.out"
            stack.enter_context(_daemon(command, out, slurm.variables))
        wait_until(slurm.answers, 30, slurm.story)
        wait_until(lambda: slurm.idle() == nodes, 30, slurm.story)
        yield slurm


def _configure(folder: Path, nodes: int) -> None:
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    control, *ports = free_ports(nodes + 1)
    host = socket.gethostname().partition(".")[0]
    lines = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
        for i, port in enumerate(ports)
    ]
    conf = _CONF.format(
        folder=folder, host=host, control=control, nodes="\n".join(lines), last=nodes - 1
    )
    (folder / "slurm.conf").write_text(conf)


def _munged(folder: Path) -> list[str]:
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
    names = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    return ["munged", "--foreground", "--force", f"--log-file={folder}/munge.log", *names]


@contextmanager
def _daemon(command: list[str], out: Path, variables: Mapping[str, str]) -> Iterator[None]:
    with out.open("w") as file:
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
