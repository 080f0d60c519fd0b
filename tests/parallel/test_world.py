"""A rank's view of the world: its groups over real processes, and what it refuses."""

import os
import time
from pathlib import Path

import pytest
import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks

KINDS = ("ep", "pp", "edp", "dp")


def test_one_process_alone_opens_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a single run that needs a store, a port or a peer."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = open_world(ParallelConfig())
    assert (world.rank, world.size) == (0, 1)
    assert not torch.distributed.is_initialized()
    for group in (world.ep, world.pp, world.edp, world.dp, world.everyone):
        assert group.ranks == (0,)
    world.close()
    world.close()


def _sums(rank: int, size: int, parallel: ParallelConfig) -> dict[str, tuple[tuple, int, int]]:
    world = open_world(parallel)
    assert (world.rank, world.size, torch.get_num_threads()) == (rank, size, 1)
    found = {}
    for kind in (*KINDS, "everyone"):
        group = getattr(world, kind)
        total = torch.tensor([2**rank])
        group.all_reduce_sum(total).wait()
        found[kind] = (group.ranks, group.index, int(total))
        assert (group.process_group is None) == (group.size == 1)
    place = world.topology.coordinates(rank)
    for kind in ("edp", "pp", "ep"):  # what torch's own tools see
        assert world.mesh.get_local_rank(kind) == getattr(place, kind)
        ranks = torch.distributed.get_process_group_ranks(world.mesh.get_group(kind))
        assert tuple(ranks) == getattr(world, kind).ranks
    world.close()
    world.close()
    assert not torch.distributed.is_initialized()
    return found


@pytest.mark.parametrize(("pp", "ep", "dp"), [(1, 2, 4), (2, 2, 4), (1, 4, 4), (2, 1, 1)])
def test_every_group_has_the_topologys_ranks(pp: int, ep: int, dp: int) -> None:
    """Catches a process group of other ranks than its kind's, or in another order."""
    topology = Topology(dp // ep, pp, ep)
    results = run_ranks(topology.world, _sums, ParallelConfig(pp=pp, ep=ep, dp=dp))
    for rank, found in enumerate(results):
        for kind in KINDS:
            ranks = topology.group(kind, rank)
            assert found[kind] == (ranks, ranks.index(rank), sum(2**r for r in ranks)), kind
        assert found["everyone"][2] == 2**topology.world - 1


def _threads_after(rank: int, size: int) -> list[str]:
    """The threads of this process once a world has been used and left, an error on its way."""
    try:
        with open_world(ParallelConfig(pp=2, dp=size // 2)) as world:
            world.everyone.gather_texts("text")
            raise ConfigError("what", rank, "rule", "fix")
    except ConfigError:  # on its way: its frames know the world
        tasks = Path("/proc/self/task").iterdir()
        return sorted((task / "comm").read_text().strip() for task in tasks)


def test_no_thread_of_a_process_group_outlives_its_world() -> None:
    """Catches a thread of gloo that wants Python while the process ends, which then says
    "terminate called without an active exception" after its own last line, and dies of SIGABRT."""
    for threads in run_ranks(4, _threads_after):
        assert not [name for name in threads if "gloo" in name], threads


def _cards(rank: int, size: int) -> list[str]:
    """Where the groups of a rank with an accelerator of another make carry tensors."""
    import kimi_pretrain.parallel.world as module

    module._device = lambda local_rank: torch.device("meta", local_rank)
    torch.distributed.get_default_backend_for_device = lambda device: "gloo"
    module._mesh = lambda *formed: None
    world = open_world(ParallelConfig(dp=size))
    assert world.device == torch.device("meta", rank)
    groups = [world.ep, world.pp, world.edp, world.dp, world.everyone]
    return [str(group.device) for group in groups]


def test_groups_carry_tensors_where_the_world_has_them() -> None:
    """Catches a group that knows NCCL only and takes another accelerator for a CPU, and a group
    of one whose tensors lie elsewhere than the model's."""
    assert run_ranks(2, _cards) == [[f"meta:{rank}"] * 5 for rank in range(2)]


def _threads(rank: int, size: int, given: tuple[str, ...]) -> str:
    os.environ["OMP_NUM_THREADS"] = given[rank]
    torch.set_num_threads(int(given[rank] or 2))  # as OpenMP took it, or took all cores
    try:
        open_world(ParallelConfig(dp=size)).close()
    except ConfigError as error:
        return str(error)
    return str(torch.get_num_threads())


def test_a_rank_computes_in_one_thread_unless_told() -> None:
    """Catches ranks of a launcher that sets no OMP_NUM_THREADS (srun, mpirun), each on all cores,
    and bits that depend on how many those are."""
    assert run_ranks(2, _threads, ("", "1")) == ["1", "1"]
    assert run_ranks(2, _threads, ("2", "2")) == ["2", "2"]


def test_ranks_of_other_threads_are_told() -> None:
    """Catches one node that exports OMP_NUM_THREADS: the run's bits would depend on its place."""
    lines = run_ranks(3, _threads, ("1", "3", "1"))
    assert len(set(lines)) == 1
    assert lines[0].startswith("threads of a rank on rank 1: got '3'; every rank must")


def _exchange(rank: int, size: int) -> dict[int, tuple[bool, float]]:
    """With each other stage: whether the two directions share a process group; what came."""
    group = open_world(ParallelConfig(pp=size)).pp
    used: dict[str, object] = {}
    isend, irecv = torch.distributed.isend, torch.distributed.irecv

    def sending(tensor: torch.Tensor, to: int, group: object) -> object:
        used["send"] = group
        return isend(tensor, to, group=group)

    def receiving(tensor: torch.Tensor, source: int, group: object) -> object:
        used["receive"] = group
        return irecv(tensor, source, group=group)

    torch.distributed.isend, torch.distributed.irecv = sending, receiving
    found = {}
    for peer in range(size):
        if peer != rank:
            came = torch.zeros(1)
            flights = [group.receive(came, peer), group.send(torch.tensor([10.0 * rank]), peer)]
            for flight in flights:
                flight.wait()
            found[peer] = (used["send"] is used["receive"], float(came))
    return found


def test_stages_have_a_process_group_a_direction() -> None:
    """Catches two neighbours that block each other on NCCL, where what two ranks exchange through
    one group runs in the order in which each was given it: both post a receive, then send."""
    for rank, found in enumerate(run_ranks(3, _exchange)):
        assert found == {peer: (False, 10.0 * peer) for peer in range(3) if peer != rank}


def _nothing(rank: int, size: int) -> int:
    return rank


def test_eight_ranks_start_quickly() -> None:
    """Catches a harness that imports torch again in every rank."""
    run_ranks(1, _nothing)  # the server itself loads torch once
    before = time.perf_counter()
    assert run_ranks(8, _nothing) == list(range(8))
    assert time.perf_counter() - before < 5


def _refusal(rank: int, size: int, parallel: ParallelConfig) -> str:
    try:
        open_world(parallel)
    except ConfigError as error:
        assert not torch.distributed.is_initialized()
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("parallel", "fix"),
    [(ParallelConfig(ep=2, dp=2), "try 4 ranks"), (ParallelConfig(dp=2), "try parallel.dp=3")],
)
def test_another_number_of_ranks_is_refused_before_any_group(
    parallel: ParallelConfig, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that the topology has no place for, noticed only in a hang."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert fix in _refusal(0, 3, parallel)


def test_a_world_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches dp=4 silently trained by one process."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"number of ranks: got 1; .* = 4; try launcher=local"):
        open_world(ParallelConfig(dp=4))


@pytest.mark.parametrize("bad", [{"RANK": "x"}, {"RANK": "4"}, {"WORLD_SIZE": ""}])
def test_a_broken_environment_is_named(
    bad: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a launcher's mistake shown as a traceback from int()."""
    for name, value in ({"RANK": "0", "WORLD_SIZE": "4"} | bad).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=next(iter(bad))):
        open_world(ParallelConfig(dp=4))
