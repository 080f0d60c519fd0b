"""How many nodes a run needs, and what is exported on each of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes of ``ranks`` ranks each: together as many as the topology has."""

    count: int
    ranks: int


def world_size(config: Config) -> int:
    """The number of ranks of a run."""
    return config.parallel.pp * config.parallel.dp


def nodes_of(config: Config) -> Nodes:
    """Whole nodes for the ranks of ``config``; fewer ranks than a node has share one.

    Raises:
        ConfigError: the ranks do not fill whole nodes, or nothing says how large a node is.
    """
    known = config.launcher.ranks_per_node
    if known is None and config.cluster.name == "local":
        rule = "it says nothing of the nodes that will run this, and a node's GPUs take a rank each"
        fix = "cluster=h800, or launcher.ranks_per_node=8"
        raise ConfigError("cluster", config.cluster.name, rule, fix)
    each = known if known is not None else config.cluster.gpus_per_node
    world, pp, ep = world_size(config), config.parallel.pp, config.parallel.ep
    if world <= each:
        return Nodes(1, world)
    if world % each:
        key = "launcher.ranks_per_node" if known is not None else "cluster.gpus_per_node"
        rule = f"they fill whole nodes of {each} ({key})"
        more = next(dp for dp in range(config.parallel.dp, world * each, ep) if pp * dp % each == 0)
        raise ConfigError(
            f"parallel.pp x parallel.dp = {pp} x {config.parallel.dp}",
            f"{world} ranks",
            rule,
            f"parallel.dp={more}: {pp * more // each} nodes, or another {key}",
        )
    return Nodes(world // each, each)


def environment_of(config: Config) -> Mapping[str, str]:
    """The cluster's variables, and over them the launcher's."""
    return {**config.cluster.environment, **config.launcher.environment}
