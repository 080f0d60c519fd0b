"""Which rank is where, from one rank to a cluster; arithmetic, no processes."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.topology import KINDS, Coordinates, Topology

_SIZE = st.integers(1, 16)
_TOPOLOGIES = st.builds(Topology, _SIZE, _SIZE, _SIZE)


@given(_TOPOLOGIES)
def test_ranks_and_coordinates_are_one_to_one(topology: Topology) -> None:
    """Catches two ranks in one place, and a place without a rank."""
    places = [topology.coordinates(rank) for rank in range(topology.world)]
    assert len(set(places)) == topology.world
    assert [topology.rank(place) for place in places] == list(range(topology.world))


@settings(deadline=None, max_examples=20)
@given(_TOPOLOGIES, st.data())
def test_groups_of_a_kind_cover_each_rank_once(topology: Topology, data: st.DataObject) -> None:
    """Catches a rank in two groups of one kind, or in none, or not in its own."""
    kind = data.draw(st.sampled_from(KINDS))
    groups = topology.groups(kind)
    sizes = {"ep": topology.ep, "pp": topology.pp, "edp": topology.edp, "dp": topology.dp}
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world))
    assert {len(group) for group in groups} == {sizes[kind]}
    rank = data.draw(st.integers(0, topology.world - 1))
    assert [group for group in groups if rank in group] == [topology.group(kind, rank)]


@given(_TOPOLOGIES, st.data())
def test_the_dp_group_counts_edp_by_ep(topology: Topology, data: st.DataObject) -> None:
    """Catches a dense shard and an expert shard that number the same ranks differently."""
    rank = data.draw(st.integers(0, topology.world - 1))
    assert topology.group("dp", rank)[topology.dp_index(rank)] == rank


@pytest.mark.parametrize("nodes", [32, 64, 256])
def test_k2_lies_on_nodes_of_eight(nodes: int) -> None:
    """Catches an expert-parallel group spread over more than two nodes, or ep not fastest."""
    topology = Topology.of_world(8 * nodes, pp=16, ep=16)
    assert topology.edp == nodes // 32
    for group in topology.groups("ep"):
        assert group == tuple(range(group[0], group[0] + 16))
        assert len({rank // 8 for rank in group}) == 2
    stages = topology.group("pp", 5)
    assert {later - earlier for earlier, later in pairwise(stages)} == {16}


@pytest.mark.parametrize(("world", "fix"), [(255, 256), (0, 256), (400, 512), (600, 512)])
def test_a_world_that_is_no_multiple_is_refused(world: int, fix: int) -> None:
    """Catches ranks left over, and advice that is not the nearest world that runs."""
    with pytest.raises(ConfigError, match=f"16 x 16 = 256; try {fix} ranks"):
        Topology.of_world(world, pp=16, ep=16)


def test_dp_counts_edp_times_ep() -> None:
    """Catches dp taken as the number of expert replicas."""
    assert Topology.of_config(ParallelConfig(pp=2, ep=2, dp=8)) == Topology(4, 2, 2)
    with pytest.raises(ConfigError, match=r"try parallel\.dp=8"):
        Topology.of_config(ParallelConfig(ep=4, dp=6))


def test_what_does_not_exist_is_refused() -> None:
    """Catches a rank beyond the world read as a place inside it, and a misspelt kind."""
    with pytest.raises(ValueError, match="rank 8 of a world of 8"):
        Topology(2, 2, 2).coordinates(8)
    with pytest.raises(ValueError, match="not tp"):
        Topology(2, 2, 2).group("tp", 0)
    assert Topology(2, 2, 2).coordinates(7) == Coordinates(1, 1, 1)
