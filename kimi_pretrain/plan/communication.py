"""What a rank sends: bytes by link, and how long they take.

An expert-parallel group's rows, a pipeline's activations and ZeRO-1's gradients and parameters
each cross links inside a node (NVLink) and between nodes (RDMA); both work at the same time.
Ranks are numbered as ``parallel.topology`` says, ``gpus_per_node`` consecutive ones a node.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from kimi_pretrain.config.schema import Config, ModelConfig
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.plan.hardware import Hardware

ROW_BYTES = 2  # bf16, an element of a row or of an activation


@dataclass(frozen=True)
class Bytes:
    """What one rank sends, by link."""

    nvlink: float = 0.0
    rdma: float = 0.0

    @property
    def total(self) -> float:
        return self.nvlink + self.rdma

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.nvlink + other.nvlink, self.rdma + other.rdma)

    def times(self, factor: float) -> "Bytes":
        return Bytes(self.nvlink * factor, self.rdma * factor)

    def seconds(self, hardware: Hardware) -> float:
        """Both links at once: the slower one decides."""
        return max(self.nvlink / hardware.nvlink, self.rdma / hardware.rdma)


def all_to_all_bytes_per_token(model: ModelConfig) -> int:
    """Bytes of a token's rows to its experts in one layer and direction; K2: 114,688."""
    return ROW_BYTES * model.num_experts_per_tok * model.hidden_size


def all_to_all(config: Config, topology: Topology, hardware: Hardware, tokens: int) -> Bytes:
    """What one dispatch or combine of a microbatch sends in one layer, with balanced routing.

    ``all_to_all`` sends a row for every choice. ``deepep`` sends one row to each node that holds
    any of a token's experts, and NVLink brings it to all of them there.
    """
    group = topology.group("ep", 0)
    at_home = _same_node(group, hardware.gpus_per_node)
    row = ROW_BYTES * config.model.hidden_size * tokens
    choices = config.model.num_experts_per_tok
    if config.parallel.dispatcher == "all_to_all" or at_home == topology.ep:
        share = choices * row / topology.ep
        return Bytes(share * (at_home - 1), share * (topology.ep - at_home))
    nodes = -(-topology.ep // at_home)
    away = nodes_of_a_token(config.model, nodes) * (nodes - 1) / nodes
    return Bytes(choices * row * (at_home - 1) / at_home, away * row)


def nodes_of_a_token(model: ModelConfig, nodes: int) -> float:
    """Nodes that hold any expert of a token, on average, its choice being uniform.

    With groups, a token's experts come from ``topk_group`` of ``n_group`` groups; where a group
    lies whole on one node, that many nodes are the most (arXiv 2412.19437, section 3.2.2).
    """
    experts, groups = model.n_routed_experts, model.n_group
    if groups > 1 and groups % nodes == 0 and model.topk_group < groups:
        a_node = groups // nodes  # groups
        size = experts // groups
        reachable, chosen = model.topk_group * size, model.num_experts_per_tok
        total = 0.0
        for taken in range(1, min(a_node, model.topk_group) + 1):
            ways = comb(a_node, taken) * comb(groups - a_node, model.topk_group - taken)
            hit = 1 - comb(reachable - taken * size, chosen) / comb(reachable, chosen)
            total += ways / comb(groups, model.topk_group) * hit
        return nodes * total
    local = experts // nodes
    chosen = model.num_experts_per_tok
    return nodes * (1 - comb(experts - local, chosen) / comb(experts, chosen))


def message(config: Config, topology: Topology, hardware: Hardware, tokens: int) -> Bytes:
    """One microbatch's activations over one boundary of stages; K2's 4,096 tokens: 58.72 MB."""
    size = ROW_BYTES * config.model.hidden_size * tokens
    group = topology.group("pp", 0)
    across = any(
        a // hardware.gpus_per_node != b // hardware.gpus_per_node
        for a, b in zip(group, (*group[1:], group[0]), strict=True)
    )
    return Bytes(rdma=size) if across else Bytes(nvlink=size)


def replicated(size: float, group: Sequence[int], hardware: Hardware) -> Bytes:
    """How ``size`` bytes that a rank sends to its replicas are split over links.

    Within a node first, then between equal places of the nodes: each rank of a node sends its
    share of what the node sends.
    """
    inside = _same_node(group, hardware.gpus_per_node)
    if inside == len(group):
        return Bytes(nvlink=size)
    return Bytes(size * (inside - 1) / inside, size / inside)


def _same_node(group: Sequence[int], gpus_per_node: int) -> int:
    """The fewest members of a group that share a node, over the nodes that have any."""
    return min(Counter(rank // gpus_per_node for rank in group).values())
