"""A run that traces a step, and `kimi-pretrain trace` of it, as a person uses them."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.pipeline.actions import SENDS, Action, Kind, Overlap, Schedule, leaves
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COMPUTE, P2P, Timeline, read_rows
from kimi_pretrain.telemetry.measured_costs import measured_schedule
from kimi_pretrain.train.loop import train
from kimi_pretrain.train.schedule import stages_of, training_schedule
from tests.distributed.ranks import run_ranks

STEPS = 2
SECONDS = 0.005  # by which the clocks of ranks may differ on a busy machine


def configured(run_dir: str, pp: int, vpp: int, dp: int, ep: int, schedule: str) -> Config:
    return compose(
        [
            "experiment=smoke",
            f"schedule.max_steps={STEPS}",
            f"schedule.global_batch_size={4 * dp}",
            "schedule.micro_batch_size=1",
            "schedule.sample_tokens=0",
            "data.sequence_length=32",
            "logging.report=false",
            "logging.console=off",
            f"logging.trace_step={STEPS}",
            f"run_dir={run_dir}",
            f"parallel.pp={pp}",
            f"parallel.vpp={vpp}",
            f"parallel.dp={dp}",
            f"parallel.ep={ep}",
            f"parallel.schedule={schedule}",
            "parallel.timeout_seconds=60",
        ]
    )


def train_as_rank(rank: int, world_size: int, *arguments: object) -> int:
    return train(configured(*arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pp", "vpp", "dp", "ep", "schedule"),
    [(2, 2, 2, 2, "k2"), (2, 1, 1, 1, "1f1b"), (1, 1, 1, 1, "none")],
    ids=str,
)
def test_a_traced_run_is_drawn_beside_its_plan(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pp: int,
    vpp: int,
    dp: int,
    ep: int,
    schedule: str,
) -> None:
    """Catches phases, all-to-alls or messages that are not measured, or under another action's
    name, ranks of another replica, files of an earlier trace, and clocks that disagree."""
    arguments = (str(tmp_path), pp, vpp, dp, ep, schedule)
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "rank-0007.jsonl").write_text("of an earlier run\n")
    assert run_ranks(pp * dp, train_as_rank, *arguments) == [0] * (pp * dp)
    assert main(["trace", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "planned: step" in said
    assert "measured: step" in said
    assert (tmp_path / "trace" / "trace.png").stat().st_size > 10_000

    config = configured(*arguments)
    plan, measured = training_schedule(config), read_rows(tmp_path / "trace")
    computing = tuple(
        tuple(n for n in row if isinstance(n, Overlap) or "_" not in n.kind) for row in plan.ranks
    )
    assert measured_schedule(measured).ranks == computing
    assert names(measured, COMPUTE) == expected_compute(config, plan)
    assert names(measured, ALL_TO_ALL) == (expected_flights(config, plan) if ep > 1 else Counter())
    sends = [n for row in plan.ranks for n in row if isinstance(n, Action) and n.kind in SENDS]
    assert names(measured, P2P) == Counter(map(str, sends))
    for rank in range(pp):
        spans = sorted((i.start, i.end) for i in measured.ranks[rank] if i.resource == COMPUTE)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    require_causes_before_effects(plan, measured)


def test_a_step_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    """Catches a run at whose end there is no trace, and nobody said so."""
    config = configured(str(tmp_path), 1, 1, 1, 1, "none")
    config = replace(config, logging=replace(config.logging, trace_step=STEPS + 1))
    with pytest.raises(ConfigError, match=f"logging.trace_step: got 3.*1 to {STEPS}"):
        train(config)


def names(timeline: Timeline, resource: str) -> Counter[str]:
    return Counter(i.name for rank in timeline.ranks for i in rank if i.resource == resource)


def layers(config: Config, stage: int) -> tuple[int, int]:
    """Dense and MoE layers of a stage."""
    dense = config.model.first_k_dense_replace
    of = stages_of(config)[stage]
    return sum(i < dense for i in of), sum(i >= dense for i in of)


def actions(plan: Schedule) -> list[Action]:
    """Every compute action of every rank."""
    all_leaves = [leaf for row in plan.ranks for node in row for leaf in leaves(node)]
    return [action for action in all_leaves if "_" not in action.kind]


def expected_compute(config: Config, plan: Schedule) -> Counter[str]:
    """How often each phase is computed."""
    wanted: Counter[str] = Counter()
    for action in actions(plan):
        dense, moe = layers(config, action.stage)
        if action.kind is Kind.W:
            wanted[f"{action} weight"] += 1
            continue
        phases = {"attend": dense + moe, "expert": moe, "combine": moe}
        phases["embedding"] = action.stage == 0
        phases["head"] = action.stage == plan.stages - 1
        wanted.update({f"{action} {phase}": times for phase, times in phases.items() if times})
        if action.kind is Kind.B:
            # The embedding and the fused head and loss add theirs themselves.
            waiting = {"attend": dense + moe, "expert": moe}
            wanted.update({f"{action} {k}.W": times for k, times in waiting.items() if times})
    return wanted


def expected_flights(config: Config, plan: Schedule) -> Counter[str]:
    """How often rows fly."""
    wanted: Counter[str] = Counter()
    for action in actions(plan):
        moe = layers(config, action.stage)[1]
        if action.kind is not Kind.W and moe:
            wanted[f"{action} dispatch"] += moe
            wanted[f"{action} combine"] += moe
    return wanted


def require_causes_before_effects(plan: Schedule, measured: Timeline) -> None:
    """No forward begins before the stage before it is done."""
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for rank in measured.ranks:
        for interval in rank:
            if interval.resource == COMPUTE:
                action = interval.name.split()[0]
                starts[action] = min(interval.start, starts.get(action, interval.start))
                ends[action] = max(interval.end, ends.get(action, interval.end))
    for number in range(plan.microbatches):
        for stage in range(1, plan.stages):
            assert ends[f"{stage - 1}F{number}"] <= starts[f"{stage}F{number}"] + SECONDS
