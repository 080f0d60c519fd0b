"""What the script for sbatch says, and what it does with the ranks' exit code."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.launch.slurm import SlurmJob, job_name, job_of, render
from tests.distributed.slurm import free_ports

K2 = (
    "experiment=k2_1t_h800_2048",
    "launcher=slurm",
    "launcher.partition=gpu",
    "launcher.time=2-00:00:00",
    "+launcher.options.switches='1'",
    "+launcher.environment.NCCL_SOCKET_IFNAME=bond0",
    "run_dir=runs/k2",
)


def _job(*overrides: str) -> SlurmJob:
    return job_of(compose([*K2, *overrides]), ["experiment=k2_1t_h800_2048"], Path("/work"))


def _lines(job: SlurmJob) -> list[str]:
    return render(job).splitlines()


def test_a_job_of_2048_gpus() -> None:
    """Catches an option that is missing, is spelt otherwise or has the wrong number."""
    lines = _lines(_job())
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")] == [
        f"job-name={job_name(Path('/work/runs/k2'))}",
        "nodes=256",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "exclusive",
        "mem=0",
        "time=2-00:00:00",
        "signal=USR1@600",
        "requeue",
        "chdir=/work",
        "output=/work/runs/k2/logs/slurm-%j.log",
        "open-mode=append",
        "partition=gpu",
        "switches=1",
    ]
    exports = [line for line in lines if line.startswith("export ")]
    assert exports == [
        "export NCCL_DEBUG=WARN",
        "export NCCL_IB_QPS_PER_CONNECTION=16",
        "export NCCL_IB_TIMEOUT=22",
        "export NCCL_SOCKET_IFNAME=bond0",
    ]
    assert any("--nodes=256 --ranks=8" in line for line in lines)


def test_the_script_is_a_function_of_the_job() -> None:
    """Catches a time, a host name or a random number in the script."""
    assert render(_job()) == render(_job())
    assert job_name(Path("/work/a")) != job_name(Path("/other/a"))


def test_a_cpu_job_asks_for_no_gpu_and_may_share_nodes() -> None:
    """Catches a GPU asked for where there is none, and nodes taken whole against one's word."""
    job = job_of(
        compose(["launcher=slurm", "cluster=cpu", "launcher.exclusive=false", "run_dir=a"]),
        [],
        Path("/work"),
    )
    script = render(job)
    assert (job.nodes, job.ranks, job.gpus) == (1, 1, 0)
    assert "gpus" not in script
    assert "exclusive" not in script


def test_an_enroot_image() -> None:
    """Catches ranks outside the image, with another Python than its own."""
    words = _lines(
        _job(
            "launcher.container.image=/images/train 1.sqsh",
            "launcher.container.mounts=['/data:/data:ro','/work:/work']",
        )
    )
    assert "    '--container-image=/images/train 1.sqsh' \\" in words
    assert "    --container-mounts=/data:/data:ro,/work:/work \\" in words
    assert "    --container-workdir=/work \\" in words
    assert any(word.startswith("    --container-env=NCCL_DEBUG,") for word in words)
    assert "    python3 -m kimi_pretrain.launch.node \\" in words


def test_an_apptainer_image() -> None:
    """Catches an image without the node's GPUs, and variables that the image's own would hide."""
    words = _lines(
        _job(
            "launcher.container.runtime=apptainer",
            "launcher.container.image=/images/train.sif",
            "launcher.container.mounts=['/data:/data:ro']",
        )
    )
    step = [word.strip(" \\") for word in words]
    start = step.index("apptainer")
    assert step[start : start + 6] == [
        *("apptainer", "exec", "--nv", "--bind=/data:/data:ro", "--pwd=/work", "/images/train.sif")
    ]
    assert "export APPTAINERENV_NCCL_DEBUG=WARN" in words


def test_a_path_that_slurm_would_read_otherwise_is_refused() -> None:
    """Catches logs at a pattern's place."""
    with pytest.raises(
        ConfigError, match=r"run_dir: got .*50%j.* meaning in a path; try /work/50-j"
    ):
        render(replace(_job(), run_dir="/work/50%j"))


# --- what happens after the ranks have ended -----------------------------------------------

_SRUN = """\
#!/bin/sh
[ -z "$PROGRESS" ] || mkdir -p "$RUN_DIR/checkpoints/step-00000020"
exit $CODE
"""
_SCONTROL = """\
#!/bin/sh
case "$*" in
    "requeue 7") echo 7 >> "$RUN_DIR/requeued";;
    "show job 7") echo "JobId=7 JobName=kimi-a"; echo "   $STATE Dependency=(null)";;
    "show hostnames "*) echo node-a;;
esac
"""


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("code", "progress", "again"),
    [
        (0, True, False),
        (1, True, False),
        (2, False, False),
        (3, True, False),
        (75, False, True),
        (4, True, True),
        (4, False, False),
        (137, True, True),
        (137, False, False),
    ],
)
def test_a_job_goes_back_into_the_queue_where_that_may_help(
    tmp_path: Path, before: bool, code: int, progress: bool, again: bool
) -> None:
    """Catches a job that fails at the same step for ever, one that stays down after a lost
    node, and a code that is not the ranks'."""
    if before:
        (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    assert _requeued(tmp_path, code, progress, RUNNING) == ("7\n" if again else "")


# As Slurm 22.05 shows them while the script of a job that it, or somebody, ends still runs.
RUNNING = "JobState=RUNNING Reason=None"
CANCELLED = "JobState=COMPLETING Reason=None"


@pytest.mark.parametrize(
    ("state", "again"),
    [
        (CANCELLED, False),
        (f"{CANCELLED} PreemptEligibleTime=2026-11-24T17:48:33 PreemptTime=None", False),
        (
            f"{CANCELLED} PreemptEligibleTime=2026-11-24T17:48:33 PreemptTime=2026-11-24T17:48:37",
            True,
        ),
        ("JobState=COMPLETING Reason=TimeLimit", True),
        (RUNNING, True),
    ],
)
def test_a_cancelled_job_stays_so(tmp_path: Path, state: str, again: bool) -> None:
    """Catches scancel, after which the job is in the queue again, and a job that Slurm itself
    ended, which then is not."""
    assert _requeued(tmp_path, 75, True, state) == ("7\n" if again else "")


def _requeued(folder: Path, code: int, progress: bool, state: str) -> str:
    """The jobs that the script put back into the queue after ranks ended with ``code``."""
    for name, text in {"srun": _SRUN, "scontrol": _SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    variables = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "RUN_DIR": str(run_dir),
        "CODE": str(code),
        "PROGRESS": "1" if progress else "",
        "STATE": state,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-a",
    }
    script = render(replace(_job(), run_dir=str(run_dir), port=free_ports(1)[0]))
    done = subprocess.run(["bash"], input=script, text=True, env=variables, check=False)
    assert done.returncode == code
    requeued = run_dir / "requeued"
    return requeued.read_text() if requeued.exists() else ""


def test_a_job_that_must_not_be_requeued_is_not() -> None:
    """Catches launcher.requeue=false that only Slurm hears."""
    script = render(_job("launcher.requeue=false"))
    assert "#SBATCH --no-requeue\n" in script
    assert "scontrol requeue" not in script
