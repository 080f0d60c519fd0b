"""The planned schedule is the one that is trained."""

from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.schedules import generate
from kimi_pretrain.plan.run_plan import memory_of_run, plan_run
from kimi_pretrain.plan.run_schedule import rank_stages, run_schedule, steady
from kimi_pretrain.train.schedule import training_schedule

BATCH = "schedule.global_batch_size=8"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.pp=2", "parallel.schedule=k2", BATCH],
        ["parallel.pp=2", "parallel.vpp=2", "parallel.schedule=dualpipe_v", BATCH],
        ["parallel.pp=2", "parallel.schedule=k2", "parallel.weight_grads_held=0", BATCH],
        ["parallel.pp=4", "parallel.schedule=zb_h1", "parallel.layer_split=balanced", BATCH],
    ],
)
def test_it_is_the_runs(overrides: list[str]) -> None:
    """Catches a plan of another order, of other messages or of other stages than those trained."""
    config = compose(overrides)
    run = run_schedule(config)
    assert run.schedule == training_schedule(config)
    assert [run.stages(rank) for rank in range(config.parallel.pp)] == rank_stages(config)


def test_weight_gradients_are_put_off_no_more_than_is_allowed() -> None:
    """Catches a limit that the run does not know of."""
    overrides = ["parallel.pp=2", "parallel.vpp=2", "parallel.schedule=dualpipe_v", BATCH]
    free, tight = (compose([*overrides, *more]) for more in ([], ["parallel.weight_grads_held=1"]))
    assert run_schedule(tight).schedule != run_schedule(free).schedule
    whole = compose([*overrides, "parallel.weight_grads_held=0"])
    assert "I" not in "".join(training_schedule(whole).to_text())


@pytest.mark.parametrize(
    ("schedule", "vpp"), [("1f1b", 1), ("k2", 1), ("k2", 2), ("zb_h1", 1), ("dualpipe_v", 2)]
)
@pytest.mark.parametrize("rest", [0, 1])
def test_a_few_microbatches_hold_as_much_as_many(schedule: str, vpp: int, rest: int) -> None:
    """Catches a run refused, or let through, for the memory of another one."""
    overrides = ["cluster=cpu", "parallel.pp=2", f"parallel.vpp={vpp}", "activation=k2"]
    overrides += [f"parallel.schedule={schedule}", "parallel.router_weights=before_down"]
    many = compose([*overrides, f"schedule.global_batch_size={24 + rest}"])
    assert steady(many).schedule.global_batch_size == 8 + rest
    assert memory_of_run(many) == plan_run(many).memory


def test_all_microbatches_of_gpipe_are_held() -> None:
    """Catches a schedule without a steady state cut short."""
    config = compose(["parallel.pp=2", "parallel.schedule=gpipe", "schedule.global_batch_size=24"])
    assert steady(config) == config


def test_a_file_is_read(tmp_path: Path) -> None:
    """Catches a plan that ignores the schedule's file."""
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(generate("gpipe", 2, 1, 8).to_text()))
    config = compose(["parallel.pp=2", f"parallel.schedule_file={path}", BATCH])
    assert run_schedule(config).schedule == training_schedule(config)
    other = compose(["parallel.pp=2", f"parallel.schedule_file={path}"])
    other.schedule.global_batch_size = 4
    with pytest.raises(ConfigError, match=r"schedule_file: got '2 x 1 x 8'.*global_batch_size=8$"):
        run_schedule(other)
    with pytest.raises(ConfigError, match="readable text file"):
        run_schedule(compose(["parallel.pp=2", f"parallel.schedule_file={tmp_path}", BATCH]))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    """Catches a plan of half a microbatch."""
    with pytest.raises(ConfigError, match=r"schedule\.global_batch_size"):
        run_schedule(compose(["parallel.dp=3", "schedule.global_batch_size=8"]))


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_too_few_microbatches_are_answered_with_keys_that_help(dp: int, size: int) -> None:
    """Catches a refusal that suggests "microbatches=4", which is no key, or a batch that is
    refused again."""
    shape = ["parallel.pp=2", "parallel.vpp=2", f"parallel.dp={dp}", "parallel.schedule=dualpipe_v"]
    config = compose([*shape, f"schedule.micro_batch_size={size}", "schedule.global_batch_size=4"])
    if dp * size == 1:
        assert run_schedule(config).schedule.microbatches == 4
        return
    with pytest.raises(ConfigError) as refused:
        run_schedule(config)
    assert refused.value.what == "schedule.global_batch_size"
    assert refused.value.rule.startswith(
        f"it makes {4 // (dp * size)} microbatches, and dualpipe_v"
    )
    fixes = refused.value.fix.split(", or ")
    assert fixes[0] == f"schedule.global_batch_size={4 * dp * size}"
    assert fixes[1:] == ["schedule.micro_batch_size=1"] * (dp == 1)
    for fix in fixes:
        config = compose(
            [
                *shape,
                f"schedule.micro_batch_size={size}",
                fix,
                *(["schedule.global_batch_size=4"] if "micro" in fix else []),
            ]
        )
        assert run_schedule(config).schedule.microbatches == 4
