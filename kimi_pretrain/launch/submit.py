"""Giving a rendered job to Slurm: at most one for a run directory at a time."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kimi_pretrain.checkpoint.run_lock import hold_run_dir, make_run_dir
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.lock import exclusive
from kimi_pretrain.launch.slurm import SlurmJob, job_of, render


def launch(arguments: Sequence[str], config: Config, dry_run: bool) -> int:
    """Submit the job that trains ``config`` by ``arguments``, or print its script; returns 0.

    Raises:
        ConfigError: the ranks do not fill whole nodes, a value cannot be quoted, the run
            directory cannot be written or is in use, or Slurm refuses the job.
    """
    job = job_of(config, arguments, Path.cwd())
    script = render(job)
    if dry_run:
        sys.stdout.write(script)
        return 0
    run_dir = Path(job.run_dir)
    make_run_dir(run_dir)
    Path(job.logs).mkdir(exist_ok=True)  # Slurm does not make it, and loses the log
    with exclusive(run_dir / ".launch.lock"):  # nobody submits between the look and the job
        hold_run_dir(run_dir).close()
        _refuse_second(job)
        (Path(job.logs) / "job.sbatch").write_text(script, encoding="utf-8")
        number = _slurm(["sbatch", "--parsable"], script).split(";")[0]
    sys.stdout.write(
        f"job {number}: {job.nodes} nodes of {job.ranks} ranks; {job.logs}/slurm-{number}.log\n"
    )
    return 0


def _refuse_second(job: SlurmJob) -> None:
    queued = _slurm(["squeue", "--noheader", "--me", f"--name={job.name}", "--format=%i"], "")
    if queued:
        number = queued.split()[0]
        rule = f"job {number} trains in it, or waits to"
        fix = f"another run_dir, or scancel {number} first"
        raise ConfigError("run_dir", job.run_dir, rule, fix)


def _slurm(command: Sequence[str], given: str) -> str:
    """What one of Slurm's commands prints."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        rule = f"{command[0]} is one of Slurm's commands and is not on this machine"
        fix = "a login node of the cluster, or --dry-run to see the script"
        raise ConfigError("launcher", "slurm", rule, fix) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"code {done.returncode}"
        fix = "another launcher.partition, launcher.time or launcher.options"
        raise ConfigError(command[0], said, "Slurm refused", fix)
    return done.stdout.strip()
