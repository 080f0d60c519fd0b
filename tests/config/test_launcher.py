"""The launcher's keys: which values a script can carry."""

from dataclasses import replace

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.launcher import (
    ContainerConfig,
    LauncherConfig,
    seconds_of,
    validate_launcher,
)

SLURM = LauncherConfig(name="slurm")
IMAGE = ContainerConfig(image="/a.sqsh")
BAD = {
    "name": (LauncherConfig(name="slrm"), "launcher.name", "=slurm"),
    "foreign": (LauncherConfig(partition="gpu"), "launcher.partition", "launcher=slurm"),
    "foreign ssh": (replace(SLURM, ssh=["rsh"]), "launcher.ssh", "launcher=hostfile"),
    "ranks": (replace(SLURM, ranks_per_node=0), "launcher.ranks_per_node", "=1"),
    "port": (replace(SLURM, port=80), "launcher.port", "=1024"),
    "restarts": (replace(SLURM, max_restarts=-1), "launcher.max_restarts", "=0"),
    "seconds": (replace(SLURM, stop_seconds=0), "launcher.stop_seconds", "=1"),
    "too late": (replace(SLURM, time="10"), "launcher.stop_seconds", "=300"),
    "time": (replace(SLURM, time="soon"), "launcher.time", "=1-00:00:00"),
    "partition": (replace(SLURM, partition="a b"), "launcher.partition", "=gpu"),
    "option name": (replace(SLURM, options={"Wrap id": "1"}), "launcher.options", "switches"),
    "option": (replace(SLURM, options={"comment": "a\nb"}), "launcher.options.comment", "=1"),
    "variable": (replace(SLURM, environment={"A-B": "1"}), "launcher.environment", "NCCL_DEBUG"),
    "value": (replace(SLURM, environment={"A": "1\n2"}), "launcher.environment.A", "=1 2"),
    "address": (replace(SLURM, address="-h"), "launcher.address", "=node-0.cluster"),
    "python": (replace(SLURM, python="a\0b"), "launcher.python", "=a b"),
    "ssh": (LauncherConfig(name="hostfile", ssh=[]), "launcher.ssh", "=[ssh]"),
    "image": (replace(SLURM, container=ContainerConfig("--x")), "launcher.container.image", "="),
    "runtime": (
        replace(SLURM, container=ContainerConfig("/a", runtime="docker")),
        "launcher.container.runtime",
        "=",
    ),
    "mount": (
        replace(SLURM, container=replace(IMAGE, mounts=["data"])),
        "launcher.container.mounts",
        "/data:/data:ro",
    ),
    "mounts of nothing": (
        replace(SLURM, container=ContainerConfig(mounts=["/a:/a"])),
        "launcher.container.mounts",
        "image=",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_launcher_cannot_use(case: str) -> None:
    """Catches a value that would end in a script, or be ignored."""
    bad, what, fix = BAD[case]
    with pytest.raises(ConfigError) as error:
        validate_launcher(bad)
    assert error.value.what == what
    assert fix in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_a_site_uses() -> None:
    """Catches rules so strict that real clusters cannot be named."""
    validate_launcher(
        replace(
            SLURM,
            partition="gpu-h800,batch",
            constraint="ib&(rack1|rack2)",
            time="7-00:00:00",
            options={"nodelist": "node[001-256]", "switches": "1@10:00", "hold": ""},
            environment={"NCCL_IB_HCA": "=mlx5_0:1,mlx5_3:1", "EMPTY": ""},
            container=ContainerConfig("nvcr.io#org/train:1", mounts=["/data:/data:ro+rprivate"]),
        )
    )
    validate_launcher(LauncherConfig(name="hostfile", hostfile="my hosts", ssh=["ssh", "-p", "1"]))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:02:03", 3723),
        ("2-3", 183600),
        ("2-3:30", 185400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", float("inf")),
    ],
)
def test_a_time_limit_in_seconds(time: str, seconds: float) -> None:
    """Catches hours taken for minutes, which would stop a job at once."""
    assert seconds_of(time) == seconds
