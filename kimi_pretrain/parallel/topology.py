"""Which rank is where: world = edp x pp x ep, ep fastest (design 4.1). Arithmetic only.

An expert-parallel group is contiguous, so that K2's 16 ranks are two nodes of 8, and a
pipeline neighbour is ``ep`` ranks away. Four kinds of groups cover the world:

====  ==========  ========================================================
kind  size        members share
====  ==========  ========================================================
ep    ep          everything but the experts they hold
pp    pp          the microbatches that run through their stages
edp   edp         the same stage and the same experts: replicas of a shard
dp    edp x ep    the same stage: replicas of its dense parameters
====  ==========  ========================================================

No torch import: a plan for 4,096 ranks is made on a laptop.
"""

from dataclasses import dataclass

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig

KINDS = ("ep", "pp", "edp", "dp")


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in each dimension, each from 0."""

    edp: int
    pp: int
    ep: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the three dimensions; each at least 1."""

    edp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def of_world(cls, world: int, pp: int = 1, ep: int = 1) -> "Topology":
        """The topology of ``world`` ranks; any multiple of pp x ep will do.

        Raises:
            ConfigError: it is no such multiple.
        """
        unit = pp * ep
        if world < 1 or world % unit:
            nearest = max(unit, round(world / unit) * unit)
            raise ConfigError(
                "number of ranks",
                world,
                f"it is a multiple of parallel.pp x parallel.ep = {pp} x {ep} = {unit}",
                f"{nearest} ranks",
            )
        return cls(world // unit, pp, ep)

    @classmethod
    def of_config(cls, parallel: ParallelConfig) -> "Topology":
        """The topology of a configuration, whose ``dp`` counts edp x ep.

        Raises:
            ConfigError: ep does not divide dp.
        """
        if parallel.dp % parallel.ep:
            raise ConfigError(
                "parallel.dp",
                parallel.dp,
                "it counts the replicas of the dense parameters, edp x ep: a multiple of "
                f"parallel.ep={parallel.ep}",
                f"parallel.dp={-(-parallel.dp // parallel.ep) * parallel.ep}",
            )
        return cls(parallel.dp // parallel.ep, parallel.pp, parallel.ep)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.edp * self.pp * self.ep

    @property
    def dp(self) -> int:
        """Replicas of the dense parameters."""
        return self.edp * self.ep

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` is.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} of a world of {self.world}")
        outer, ep = divmod(rank, self.ep)
        edp, pp = divmod(outer, self.pp)
        return Coordinates(edp, pp, ep)

    def rank(self, place: Coordinates) -> int:
        """Who is at ``place``; the inverse of ``coordinates``."""
        return (place.edp * self.pp + place.pp) * self.ep + place.ep

    def dp_index(self, rank: int) -> int:
        """The rank's number in its dp group, edp x ep with ep fastest."""
        place = self.coordinates(rank)
        return place.edp * self.ep + place.ep

    def group(self, kind: str, rank: int) -> tuple[int, ...]:
        """The ranks of the group of one of ``KINDS`` that ``rank`` is in, in order."""
        at = self.coordinates(rank)
        if kind == "ep":
            places = [Coordinates(at.edp, at.pp, i) for i in range(self.ep)]
        elif kind == "pp":
            places = [Coordinates(at.edp, i, at.ep) for i in range(self.pp)]
        elif kind == "edp":
            places = [Coordinates(i, at.pp, at.ep) for i in range(self.edp)]
        elif kind == "dp":
            places = [Coordinates(i, at.pp, j) for i in range(self.edp) for j in range(self.ep)]
        else:
            raise ValueError(f"a group is one of {', '.join(KINDS)}, not {kind}")
        return tuple(self.rank(place) for place in places)

    def groups(self, kind: str) -> list[tuple[int, ...]]:
        """Every group of a kind; together they hold each rank once."""
        return sorted({self.group(kind, rank) for rank in range(self.world)})
