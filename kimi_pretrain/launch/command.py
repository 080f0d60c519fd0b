"""``kimi-pretrain launch local|slurm|hostfile``: ``train`` with a launcher, and its dry run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.checkpoint.run_lock import hold_run_dir
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.names import LAUNCHERS
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import Config
from kimi_pretrain.launch import hostfile, local, submit
from kimi_pretrain.launch.nodes import world_size
from kimi_pretrain.plan.report import refusal
from kimi_pretrain.plan.run_plan import memory_of_run, unplanned
from kimi_pretrain.plan.shortage import shortage

USAGE = f"""\
usage: kimi-pretrain launch {"|".join(LAUNCHERS)} [--dry-run] [KEY=VALUE | GROUP=OPTION]...

Start the ranks of `kimi-pretrain train KEY=VALUE...` on this machine, as a Slurm job, or by ssh
on the hosts of a file. --dry-run prints the script or the commands and starts nothing.
`kimi-pretrain train --help` lists what can be set; docs/launch.md says more.

  kimi-pretrain launch slurm --dry-run experiment=k2_1t_h800_2048 launcher.partition=gpu
"""

_DRY_RUN = "--dry-run"


@dataclass(frozen=True)
class Launch:
    """What the words after ``launch`` ask for."""

    launcher: str
    overrides: list[str]  # the command line of ``train``
    dry_run: bool


def parse(argv: Sequence[str]) -> Launch:
    """The launch that ``argv`` describes. A group of one's own may stand for the launcher's.

    Raises:
        ConfigError: the first word is no launcher.
    """
    word, rest = argv[0], list(argv[1:])
    if word not in LAUNCHERS:
        rule = f"the launchers are {', '.join(LAUNCHERS)}"
        raise ConfigError("launch", word, rule, f"launch {nearest_name(word, LAUNCHERS)}")
    overrides = [text for text in rest if text != _DRY_RUN]
    if not any(text.startswith("launcher=") for text in overrides):
        overrides.insert(0, f"launcher={word}")
    return Launch(word, overrides, _DRY_RUN in rest)


def start(
    arguments: Sequence[str], config: Config, launcher: str | None = None, dry_run: bool = False
) -> int:
    """Start the ranks of ``config``, each with the command line ``arguments``.

    Returns:
        Their exit code, or 0 once a job is in the queue.

    Raises:
        ConfigError: they do not fit their nodes or their memory, the run directory cannot be
            had, or the configuration is of another ``launcher``.
    """
    name = config.launcher.name
    if launcher not in (None, name):
        rule = f"launch {launcher} starts ranks by {launcher}"
        raise ConfigError("launcher", name, rule, f"kimi-pretrain launch {name}")
    _require_memory(config)
    if name == "slurm":
        return submit.launch(arguments, config, dry_run)
    if name == "hostfile":
        return hostfile.launch(arguments, config, dry_run)
    if dry_run:
        rule = "local ranks are started as they are, and there is no script to show"
        raise ConfigError(_DRY_RUN, "launch local", rule, "train --cfg job --resolve")
    hold_run_dir(Path(config.run_dir)).close()  # refused here, before torchrun starts anything
    return local.launch("kimi_pretrain.train", arguments, world_size(config))


def _require_memory(config: Config) -> None:
    """Refuses ranks whose cluster is known, and known to be too small for them."""
    if not config.launcher.check_memory:
        return
    unknown = unplanned(config)
    if unknown is None:
        short = shortage(config, memory_of_run(config))
        if short is not None:
            besides = ", or launcher.check_memory=false to start it all the same"
            raise refusal(config, short, besides)
    elif config.cluster.memory_bytes is not None:
        sys.stderr.write(f"kimi-pretrain: memory is not checked: {unknown}\n")
