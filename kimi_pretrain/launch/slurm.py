"""A Slurm job as data, and the script that sbatch is given, a pure function of it.

One task a node runs that node's torchrun. Slurm sends SIGUSR1 to the tasks a while before the
time limit; ranks checkpoint and end with 75, and the script puts the job back into the queue.
A job that lost a rank or a node goes back too, but only where this start got as far as a new
checkpoint: one that fails at the same step again and again does not. One that was cancelled stays
so, although its ranks heard SIGTERM and have a checkpoint.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from kimi_pretrain import __version__
from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.schema import Config
from kimi_pretrain.launch.container import Container
from kimi_pretrain.launch.node import MODULE
from kimi_pretrain.launch.nodes import environment_of, nodes_of
from kimi_pretrain.launch.quoting import directive_value, refuse_path, shell_word, shell_words

# When the first node's ranks have ended the others have: they leave together, or lost a peer.
LEAVE_SECONDS = 120


@dataclass(frozen=True)
class SlurmJob:
    """Everything that the script says.

    ``ranks`` is of one node, ``gpus`` too (0: none are asked for). ``address`` None: the first
    node's name. ``options`` are more of sbatch's, in its own words.
    """

    name: str
    nodes: int
    ranks: int
    gpus: int
    folder: str  # the working directory
    run_dir: str
    arguments: tuple[str, ...]  # of `kimi-pretrain train`
    python: str
    port: int
    address: str | None
    max_restarts: int
    environment: Mapping[str, str]
    options: Mapping[str, str]
    time: str | None
    stop_seconds: int
    requeue: bool
    exclusive: bool
    container: Container | None

    @property
    def logs(self) -> str:
        """Where the job and every rank write."""
        return f"{self.run_dir}/logs"


def job_of(config: Config, arguments: Sequence[str], folder: Path) -> SlurmJob:
    """The job that trains ``config``.

    Args:
        config: of the run, with its ``launcher`` part.
        arguments: the ranks' command line.
        folder: the working directory on all nodes; a relative run directory is below it.

    Raises:
        ConfigError: the ranks do not fill whole nodes.
    """
    launcher, nodes = config.launcher, nodes_of(config)
    run_dir = folder / config.run_dir
    gpus = nodes.ranks if config.cluster.device == "gpu" else 0
    image = launcher.container
    within = image.image is not None
    named = {
        key: value
        for key in ("partition", "account", "qos", "reservation", "constraint")
        if (value := getattr(launcher, key)) is not None
    }
    return SlurmJob(
        name=job_name(run_dir),
        nodes=nodes.count,
        ranks=nodes.ranks,
        gpus=gpus,
        folder=str(folder),
        run_dir=str(run_dir),
        arguments=tuple(arguments),
        python=launcher.python or ("python3" if within else sys.executable),
        port=launcher.port,
        address=launcher.address,
        max_restarts=launcher.max_restarts,
        environment=environment_of(config),
        options={**named, **launcher.options},
        time=launcher.time,
        stop_seconds=launcher.stop_seconds,
        requeue=launcher.requeue,
        exclusive=launcher.exclusive,
        container=Container(image.image, image.runtime, tuple(image.mounts), str(folder), gpus > 0)
        if image.image is not None
        else None,
    )


def job_name(run_dir: Path) -> str:
    """The same for every launch into one run directory, and for no other."""
    digest = blake2b(str(run_dir).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.name)[:40]
    return f"kimi-{readable}-{digest}"


def render(job: SlurmJob) -> str:
    """The text for sbatch.

    Raises:
        ConfigError: a value that cannot be quoted so that it arrives as it is.
    """
    exports = job.container.exports(job.environment) if job.container else job.environment
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{option}" for option in _directives(job)),
        "",
        f"# Made by `kimi-pretrain launch slurm`, kimi_pretrain {__version__} (docs/launch.md).",
        "",
        *(f"export {name}={shell_word(name, value)}" for name, value in exports.items()),
        f"run_dir={shell_word('run_dir', job.run_dir)} port={job.port}",
        _first_node(job),
        _START,
        " \\\n    ".join(_step(job)),
        "code=$?\n",
        _requeue(job),
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


# This script runs on the first node, which holds the rendezvous. The node looks itself too, but
# its word comes when the others wait already, for two minutes.
_START = f"""\
start=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}

newest_checkpoint() {{
    local found=("$run_dir"/checkpoints/step-*/)
    printf '%s' "${{found[-1]}}"
}}

if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "kimi-pretrain: launcher.port: got $port; another program of $HOSTNAME listens at it," \\
        "where the nodes are to meet; try another launcher.port" >&2
    exit {exit_codes.BAD_INPUT}
fi
trap : TERM  # of scancel: wait for the ranks, which have heard it too
before=$(newest_checkpoint)
"""

# A cancelled job is COMPLETING until its last process has ended, and Slurm takes its requeue. So
# are jobs that Slurm ends: those have a reason, or the time of their preemption, or are on their
# way back already (PreemptMode=REQUEUE), and a second requeue would be refused.
_LOST = f"""\
cancelled() {{
    local job
    job=$(scontrol show job "$SLURM_JOB_ID") \\
        && [[ $job =~ JobState=(CANCELLED|COMPLETING) ]] \\
        && [[ ! $job =~ Reason=TimeLimit|PreemptTime=[0-9] ]]
}}

if ((code == {exit_codes.SIGNAL})); then
    again=1  # stopped in order, with a checkpoint
elif ((code == {exit_codes.PEER} || code > {exit_codes.SIGNALLED})) \\
    && [[ $(newest_checkpoint) != "$before" ]]; then
    again=1  # lost a rank or a node, after progress
else
    again=0
fi
if ((again)) && cancelled; then
    again=0
fi
if ((again)); then
    echo "job $start ended with code $code and goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || echo "Slurm does not requeue it: sbatch it again to go on"
fi"""


def _directives(job: SlurmJob) -> list[str]:
    log = directive_value(refuse_path("run_dir", job.logs) + "/slurm-%j.log")
    folder = directive_value(refuse_path("working directory", job.folder))
    return [
        f"job-name={job.name}",
        f"nodes={job.nodes}",
        "ntasks-per-node=1",
        *([f"gpus-per-node={job.gpus}"] if job.gpus else []),
        *(["exclusive", "mem=0"] if job.exclusive else []),
        *([f"time={job.time}"] if job.time else []),
        f"signal=USR1@{job.stop_seconds}",
        "requeue" if job.requeue else "no-requeue",
        f"chdir={folder}",
        f"output={log}",
        "open-mode=append",
        *(f"{name}={value}" if value else name for name, value in job.options.items()),
    ]


def _first_node(job: SlurmJob) -> str:
    if job.address is not None:
        return f"first={shell_word('launcher.address', job.address)}"
    return 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def _step(job: SlurmJob) -> list[str]:
    """The words of srun, each quoted; the shell fills in the job's own variables."""
    container = job.container
    return [
        # A task has its whole node, not the one core that a task is by default.
        f"srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait={LEAVE_SECONDS}",
        *shell_words("container", container.step_options(job.environment) if container else []),
        *shell_words("container", container.command() if container else []),
        f"{shell_word('launcher.python', job.python)} -m {MODULE}",
        f"--nodes={job.nodes} --ranks={job.ranks} --max-restarts={job.max_restarts}",
        '--address="$first" --port="$port" --run-id="$start" --logs="$run_dir/logs/$start"',
        "--",
        *shell_words("override", job.arguments),
    ]


def _requeue(job: SlurmJob) -> str:
    return _LOST if job.requeue else ""
