"""The ranks of a run as one of them sees them: its place, its device and its groups."""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore

from kimi_pretrain import __version__
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.errors import PeerError, first_line, named
from kimi_pretrain.parallel.rendezvous import Place, meet
from kimi_pretrain.parallel.topology import Topology


@dataclass
class World:
    """One rank's view; groups of one rank use no process group.

    ``mesh`` is the same world as a DeviceMesh of dimensions edp, pp, ep over the same process
    groups, for what in torch asks for one; None in a single process.
    """

    topology: Topology
    rank: int
    device: torch.device
    ep: Group
    pp: Group
    edp: Group
    dp: Group
    everyone: Group
    mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.topology.world

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes what exists once."""
        return self.rank == 0

    def close(self) -> None:
        """Leave every process group and end its threads; again and again without harm.

        Waits for what is in flight. A thread of gloo frees an operation's tensors some time
        after ``wait`` has returned, and needs Python for that: one that is left when Python
        ends aborts the process ("terminate called without an active exception"). Torch ends
        the threads of a process group with the last reference to it, so none is kept here.
        """
        for group in (self.ep, self.pp, self.edp, self.dp, self.everyone):
            group.process_group = group.downwards = None
        self.mesh = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close, but for an error that the other ranks do not share.

        What is in flight then may wait for a lost peer, or for this rank itself; the process
        is to end at once (``train.__main__``).
        """
        if error is None or isinstance(error, ConfigError):
            self.close()


def open_world(parallel: ParallelConfig, facts: Mapping[str, str] | None = None) -> World:
    """Meet the other ranks of the environment (torchrun's variables) and form the groups.

    One process alone opens no process group. Otherwise gloo carries CPU tensors and the
    accelerator's own backend (NCCL) a GPU's, and every operation ends within
    ``parallel.timeout_seconds``. On CPUs a rank computes in one thread unless OMP_NUM_THREADS
    says otherwise: ranks share cores, and products in several threads depend on their number.

    Args:
        parallel: the topology, and how long to wait.
        facts: what else must be the same on every rank, by name; compared before any process
            group exists.

    Raises:
        ConfigError: the number of ranks is not the configured topology's, or versions,
            ``facts``, threads of a CPU rank or topologies differ between ranks (the same line
            on all of them).
        PeerError: some rank did not come in time.
    """
    place, topology = Place.of_environment(), Topology.of_config(parallel)
    _require_size(place, topology)
    device = _device(place.local_rank)
    if topology.world > 1:
        facts = {**(facts or {}), **_threads(device)}
        _join(place, device, _compared(topology, facts), parallel.timeout_seconds)
    deadline = parallel.timeout_seconds
    formed = {
        kind: _form(kind, topology.group(kind, place.rank), topology, deadline)
        for kind in ("ep", "pp", "edp", "dp")
    }
    stages = topology.group("pp", place.rank)
    downwards = _form("pp", stages, topology, deadline) if len(stages) > 1 else None

    def group(kind: str, ranks: tuple[int, ...], made: Any, downwards: Any = None) -> Group:
        index = ranks.index(place.rank)
        made = made if len(ranks) > 1 else None
        return Group(kind, ranks, index, made, deadline, downwards, device)

    groups = {
        kind: group(
            kind,
            topology.group(kind, place.rank),
            made,
            downwards if kind == "pp" else None,
        )
        for kind, made in formed.items()
    }
    whole = dist.group.WORLD if topology.world > 1 else None
    everyone = group("world", tuple(range(topology.world)), whole)
    mesh = _mesh(topology, device, formed) if topology.world > 1 else None
    return World(topology, place.rank, device, **groups, everyone=everyone, mesh=mesh)


def _join(place: Place, device: torch.device, facts: dict[str, str], timeout: float) -> None:
    """Meet everyone, then open the process group of the whole world."""
    store = meet(place, timeout, facts)
    with _peer_errors("forming the process group of all ranks"):
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            store=PrefixStore("world", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout),
        )


def _form(kind: str, ranks: tuple[int, ...], topology: Topology, timeout: float) -> Any:
    """The process group of ``ranks``, of which this rank is one.

    Each kind has process groups of its own even where two kinds have the same ranks: neither
    has to keep its operations in order with the other's. Only its members make a group, since
    a barrier of the whole world for each of hundreds of groups would take minutes.
    """
    if topology.world == 1:
        return None
    with _peer_errors(f"forming the {kind} group of {named(ranks)}"):
        return dist.new_group(
            list(ranks),
            timeout=timedelta(seconds=timeout),
            use_local_synchronization=True,
            group_desc=kind,
        )


def _mesh(topology: Topology, device: torch.device, formed: dict[str, Any]) -> DeviceMesh:
    """The process groups as a mesh.

    A mesh that made its own groups would give them torch's deadline of 30 minutes.
    """
    shape = (topology.edp, topology.pp, topology.ep)
    return DeviceMesh.from_group(
        [formed[kind] for kind in ("edp", "pp", "ep")],
        device.type,
        mesh=torch.arange(topology.world).view(shape),
        mesh_dim_names=("edp", "pp", "ep"),
    )


@contextmanager
def _peer_errors(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError, or gloo's own
        raise PeerError(f"{what}: {first_line(error)}") from error


def _require_size(place: Place, topology: Topology) -> None:
    if place.world == topology.world:
        return
    sizes = f"parallel.pp x parallel.dp = {topology.pp} x {topology.dp} = {topology.world}"
    if place.world == 1:
        rule = f"the topology has {sizes}"
        fix = f"launcher=local, or torchrun --nproc-per-node={topology.world}"
        raise ConfigError("number of ranks", place.world, rule, fix)
    Topology.of_world(place.world, topology.pp, topology.ep)
    fix = f"parallel.dp={place.world // topology.pp}, or {topology.world} ranks"
    raise ConfigError("number of ranks", place.world, f"the topology has {sizes}", fix)


def _compared(topology: Topology, facts: Mapping[str, str]) -> dict[str, str]:
    """What must agree, causes first: another release may know other facts."""
    return {
        "version of kimi_pretrain": __version__,
        "version of torch": str(torch.__version__),
        "version of python": platform.python_version(),
        **facts,
        "topology": f"edp {topology.edp} x pp {topology.pp} x ep {topology.ep}",
    }


def _threads(device: torch.device) -> dict[str, str]:
    """Settle in how many threads a rank of a CPU computes; what all must have the same."""
    if device.type != "cpu":
        return {}
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    return {"threads of a rank": str(torch.get_num_threads())}


def _device(local_rank: int) -> torch.device:
    """This rank's accelerator, made the current one, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        rule = f"each rank of a node has a device of its own, and this node has {count}"
        raise ConfigError("LOCAL_RANK", local_rank, rule, f"{count} ranks a node")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(accelerator.type, local_rank)
