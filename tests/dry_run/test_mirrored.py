"""Groups without peers: they count as real ones do, and refuse what would hang there."""

import pytest
import torch
from torch import Tensor

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.dry_run.mirrored import MirroredGroup, mirrored_world


def group(size: int = 4, rank: int = 1) -> MirroredGroup:
    return MirroredGroup("ep", range(size), rank, lambda buffer: None, 2)


def unknown(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_a_world_is_the_ranks_own() -> None:
    """Catches groups of another rank, which have its neighbours and its shard."""
    world = mirrored_world(ParallelConfig(pp=2, ep=4, dp=8), 13, lambda buffer: None, 8)
    assert (world.ep.ranks, world.ep.index) == ((12, 13, 14, 15), 1)
    assert (world.pp.ranks, world.pp.index) == ((9, 13), 1)
    assert (world.dp.size, world.dp.index) == (8, 5)
    assert world.everyone.size == 16
    assert world.device.type == "meta"


def test_every_peer_sends_what_this_rank_sends_itself() -> None:
    """Catches counts that arrive as this rank's own order, or not at all."""
    sent = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    arriving = torch.zeros_like(sent)
    group().all_to_all(arriving, sent).wait()
    assert arriving.tolist() == [[3, 4]] * 4


def test_bytes_are_counted_without_the_ranks_own() -> None:
    """Catches traffic of a group of one, or of all parts."""
    ep = group()
    ep.all_to_all(unknown(8, 5), unknown(6, 5), [1, 2, 2, 3], [0, 2, 1, 3]).wait()
    assert ep.traffic.sent == {"all_to_all": 4 * 5 * 4}
    ep.reduce_scatter(unknown(2), unknown(8)).wait()
    ep.all_gather(unknown(8), unknown(2)).wait()
    assert ep.traffic.sent["reduce_scatter"] == ep.traffic.sent["all_gather"] == 24


def test_splits_and_sizes_that_do_not_fit_are_refused() -> None:
    """Catches a dry run that passes where real ranks hang or lose rows."""
    ep = group()
    with pytest.raises(ValueError, match="do not split 6 rows"):
        ep.all_to_all(unknown(8, 5), unknown(6, 5), [1, 2, 2, 3], [0, 2, 1, 2])
    with pytest.raises(ValueError, match="do not split 6 rows"):
        ep.all_to_all(unknown(8, 5), unknown(6, 5), [1, 2, 2, 3])
    with pytest.raises(ValueError, match="cannot arrive"):
        ep.all_to_all(unknown(4, 5), unknown(4, 6))
    with pytest.raises(ValueError, match="is not 4 times"):
        ep.reduce_scatter(unknown(2), unknown(9))
    with pytest.raises(ValueError, match="is not 4 times"):
        ep.all_gather(unknown(8), unknown(3))


def test_bytes_to_other_nodes_are_told_apart() -> None:
    """Catches NVLink's bytes counted as RDMA's, and rows to a peer counted by even parts."""
    ep = group()  # rank 1 of 4, two a node
    ep.all_to_all(unknown(8, 5), unknown(6, 5), [1, 2, 2, 3], [0, 2, 1, 3]).wait()
    ep.all_to_all(unknown(8, 5), unknown(8, 5), name="even").wait()
    ep.send(unknown(3), 0).wait()
    ep.send(unknown(7), 3).wait()
    assert ep.between_nodes == {"all_to_all": 4 * 5 * 4, "even": 4 * 5 * 4, "send": 28}


def test_rows_fly_until_they_are_waited_for() -> None:
    """Catches all-to-alls of a pair that are not counted together, or one that never lands."""
    ep = group()
    first = ep.all_to_all(unknown(4), unknown(4))
    second = ep.all_to_all(unknown(8), unknown(8))
    first.wait()
    first.wait()
    ep.all_to_all(unknown(4), unknown(4)).wait()
    second.wait()
    assert ep.most_flying == 2 * (16 + 32)
