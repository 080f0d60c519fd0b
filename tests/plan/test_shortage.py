"""What a plan says that does not fit."""

from kimi_pretrain.config import compose
from kimi_pretrain.plan.report import fit_lines
from kimi_pretrain.plan.run_plan import memory_of_run, plan_run
from kimi_pretrain.plan.shortage import shortage

SMALL = ["experiment=k2_1t_h800_256", "schedule.global_batch_size=1024"]


def test_a_plan_that_fits_lacks_nothing() -> None:
    """Catches advice for who needs none."""
    plan = plan_run(compose([*SMALL, "parallel.dp=32"]))
    assert shortage(plan.config, plan.memory) is None
    assert next(iter(fit_lines(plan, None))).startswith("fits: pipeline rank")


def test_k2_on_256_gpus_lacks_room_for_its_state() -> None:
    """Catches a shortage without its size, its place or a change that was tried and fits."""
    run = ["experiment=k2_1t_h800_256", "schedule.global_batch_size=4096"]
    run += ["cluster.memory_bytes=77e9"]
    plan = plan_run(compose(run))
    short = shortage(plan.config, plan.memory)
    assert short is not None
    assert (short.place, short.largest) == ("GPU", "optimizer")
    assert short.over == plan.memory[short.rank].total - 77e9
    cheapest, same = short.changes
    assert (cheapest.gpus, same.gpus) == (512, 256)
    assert cheapest.gpu_hours < same.gpu_hours
    for change in short.changes:
        words = [word for override in change.overrides for word in override.split()]
        assert plan_run(compose([*run, *words])).fits
    assert max(map(len, fit_lines(plan, short))) <= 100


def test_k2_on_256_gpus_has_no_room_to_put_weight_gradients_off() -> None:
    """Catches advice to buy GPUs where one key is enough."""
    run = ["experiment=k2_1t_h800_256", "schedule.global_batch_size=1024"]
    config = compose([*run, "parallel.weight_grads_held=null"])
    short = shortage(config, memory_of_run(config))
    assert short is not None
    (change,) = short.changes
    assert change.overrides == ("parallel.weight_grads_held=0",)
    assert plan_run(compose(run)).fits


def test_everything_kept_needs_k2s_policy() -> None:
    """Catches advice that buys GPUs where activations are what is too large."""
    plan = plan_run(compose([*SMALL, "parallel.dp=32", "activation=none"]))
    short = shortage(plan.config, plan.memory)
    assert short is not None
    assert short.largest == "activations"
    assert short.changes[0].overrides == ("activation=k2",)


def test_the_hosts_memory_is_a_limit_too() -> None:
    """Catches offloaded activations that nobody has room for."""
    plan = plan_run(compose([*SMALL, "parallel.dp=32", "cluster.host_memory_bytes=1e11"]))
    assert not plan.fits
    short = shortage(plan.config, plan.memory)
    assert short is not None
    assert short.place == "host"


def test_what_nothing_helps_is_said() -> None:
    """Catches an empty line of advice."""
    plan = plan_run(compose([*SMALL, "cluster.memory_bytes=1e9"]))
    short = shortage(plan.config, plan.memory)
    assert short is not None
    assert short.changes == ()
    assert "no single change" in "\n".join(fit_lines(plan, short))
