"""A preflight of four ranks, of which one is slow on purpose."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks

HOSTS = ("node-a", "node-b", "node-b", "node-b")
APART = ("node-a", "node-b", "node-c", "node-c")  # the slow rank has counterparts on two hosts
SLOW, PLANTED = 2, 0.02  # the slow rank, and seconds more that everything takes it
FACTOR = 3.0  # far above what a busy machine does to a healthy rank's quickest round


def sleepy(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        time.sleep(PLANTED)
        return function(*arguments)

    return call


def examine_as_rank(rank: int, world_size: int, run_dir: str) -> dict[str, Any]:
    from kimi_pretrain.doctor import probes
    from kimi_pretrain.doctor.examine import examine
    from kimi_pretrain.doctor.outliers import outliers

    probes.CPU = replace(probes.CPU, rounds=5)
    if rank == SLOW:
        alone = probes._alone
        probes._alone = lambda device, load: [
            (name, sleepy(work), amount, unit) for name, work, amount, unit in alone(device, load)
        ]
        probes.Group.send = sleepy(probes.Group.send)  # type: ignore[method-assign]
    if HOSTS[rank] == "node-b":
        os.environ["NCCL_IB_HCA"] = "mlx5_3"
    config = compose([f"run_dir={run_dir}"])
    world = open_world(replace(config.parallel, dp=world_size, timeout_seconds=60.0))
    found = examine(config, world, HOSTS[rank]).data()
    probes._alone = lambda device, load: []
    found["apart"] = {
        each.name: [(one.rank, one.host, one.ratio) for one in slow]
        for each in probes.probe(world, APART)
        if (slow := outliers(each.name, each.seconds, APART))
    }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("runs")
    first, *others = run_ranks(4, examine_as_rank, str(run_dir))
    assert all(other == first for other in others), "ranks must agree on the verdict"
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name", ["matmul 384 x 384 float32", "memory copy", "exchange within a host"]
)
def test_the_slow_rank_is_named_with_its_host(found: dict[str, Any], name: str) -> None:
    """Catches a slow rank that nobody names, or one that is named for its partner's sake: a rank
    that exchanges with the slow one is quick with another."""
    slow = [each for each in found["slow"] if each["probe"] == name]
    worst = slow[0]
    assert (worst["rank"], worst["host"]) == (SLOW, "node-b")
    assert worst["ratio"] > FACTOR
    assert [each["rank"] for each in slow if each["ratio"] > FACTOR] == [SLOW]
    assert not found["fit"]
    (finding,) = [each for each in found["findings"] if each["what"] == name]
    assert finding["level"] == "bad"
    assert f"rank {SLOW} on node-b" in finding["text"]


def test_a_rank_that_is_slow_between_hosts_is_named(found: dict[str, Any]) -> None:
    """Catches a bad network card that shows within no host, or is told of the host it sends to."""
    slow = [one for one in found["apart"]["exchange between hosts"] if one[2] > FACTOR]
    assert [one[:2] for one in slow] == [(SLOW, "node-c")]


def test_an_all_to_all_holds_up_everyone(found: dict[str, Any]) -> None:
    """Catches an all-to-all that is not run, or of which ranks report different sizes."""
    (probe,) = [each for each in found["probes"] if each["name"] == "all-to-all of 4 ranks"]
    assert all(seconds > 0 for seconds in probe["seconds"])


def test_hosts_are_compared(found: dict[str, Any]) -> None:
    """Catches a node with another setting than the rest."""
    assert list(found["looks"]) == ["node-a", "node-b"]
    (finding,) = [each for each in found["findings"] if "NCCL_IB_HCA" in each["what"]]
    assert finding["text"] == "node-b has mlx5_3, where node-a has nothing"


def test_clocks_of_one_machine_agree(found: dict[str, Any]) -> None:
    """Catches clocks that are not compared, or compared with what stood still meanwhile."""
    assert len(found["clocks"]) == 4
    assert max(map(abs, found["clocks"])) < 1.0
