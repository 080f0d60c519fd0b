"""Every shipped experiment is planned and dry-run; what is counted is what is planned.

With as few microbatches as its schedule takes and on its first two ranks and its last; the whole
steps are `make dry-run-presets`.
"""

from dataclasses import replace

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.composition import conf_dir
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.dry_run.commands import runnable
from kimi_pretrain.dry_run.compare import compare
from kimi_pretrain.dry_run.rank import dry_run_rank
from kimi_pretrain.plan.run_plan import plan_run

PRESETS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def shortened(name: str) -> Config:
    """The experiment with a step of few microbatches, on a cluster whose facts are known."""
    config = compose([f"experiment={name}"])
    if config.cluster.memory_bytes is None:
        config = compose([f"experiment={name}", "cluster=cpu"])
    parallel = config.parallel
    count = 2 * parallel.pp if parallel.schedule == "dualpipe_v" else max(2, parallel.pp)
    batch = count * micro_batch_size(config) * parallel.dp
    config, _ = runnable(
        replace(config, schedule=replace(config.schedule, global_batch_size=batch))
    )
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_as_planned(name: str) -> None:
    """Catches a preset that cannot run, and a plan that is not of the program that would run."""
    config = shortened(name)
    plan = plan_run(config)
    world = plan.topology.world
    for rank in sorted({0, min(1, world - 1), world - 1}):
        differing = [row for row in compare(plan, dry_run_rank(config, rank)) if not row.agrees]
        assert not differing, f"rank {rank}"
