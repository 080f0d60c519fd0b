"""`kimi-pretrain plan --dry-run`: ranks of the program itself, one after the other."""

import json
import resource
from collections.abc import Sequence
from dataclasses import replace

import torch

from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.validate import validate_training
from kimi_pretrain.dry_run.compare import compare
from kimi_pretrain.dry_run.rank import dry_run_rank
from kimi_pretrain.dry_run.report import Compared, dry_run_data, head_lines, rank_lines
from kimi_pretrain.plan.run_plan import plan_run


def main(config: Config, ranks: Sequence[int], as_json: bool) -> int:
    """Run ``ranks`` of ``config`` and print what they held and sent beside the plan.

    Returns:
        0, or 1 where something differs: a defect of the planner or of the program.

    Raises:
        ConfigError: what cannot be trained or planned.
    """
    torch.set_num_threads(1)  # others have nothing to compute, and would wait for it at full speed
    config, notes = runnable(config)
    validate_training(config)
    plan = plan_run(config)
    if not as_json:
        print("\n".join(head_lines(plan, notes)), flush=True)
    compared: list[Compared] = []
    for rank in ranks:
        run = dry_run_rank(config, rank)
        rows = compare(plan, run)
        compared.append((run, rows))
        if not as_json:
            print("\n".join(["", *rank_lines(run, rows)]), flush=True)
    if as_json:
        print(json.dumps(dry_run_data(compared, notes), indent=2))
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"\nthis process had {peak / 1e9:.2f} GB at most")
    agrees = all(row.agrees for _, rows in compared for row in rows)
    return exit_codes.DONE if agrees else exit_codes.DEFECT


def runnable(config: Config) -> tuple[Config, list[str]]:
    """What of ``config`` can be run without a GPU, and a note of what is run in place of more."""
    if config.parallel.dispatcher != "deepep":
        return config, []
    parallel = replace(config.parallel, dispatcher="all_to_all")
    note = "all_to_all is run and planned in place of deepep, whose kernels need a GPU"
    return replace(config, parallel=parallel), [note]
