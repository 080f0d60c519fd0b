"""What a GPU and its links do in practice: a cluster's facts times assumed efficiencies."""

from dataclasses import dataclass, fields

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ClusterConfig, EfficiencyConfig

_FACTS = (
    "peak_flops",
    "memory_bytes",
    "memory_bandwidth",
    "nvlink_bandwidth",
    "nic_bandwidth",
    "host_memory_bytes",
    "host_bandwidth",
)


@dataclass(frozen=True)
class Hardware:
    """Rates that a step reaches. FLOP/s and bytes/s of one GPU, bandwidths in one direction."""

    name: str
    peak: float  # dense bf16 FLOP/s, which MFU is held against
    matmul: float
    grouped_matmul: float
    attention: float
    memory: float  # bytes/s of the GPU's own memory
    nvlink: float
    rdma: float  # the GPU's share of its node's NICs
    host: float
    memory_bytes: float
    host_memory_bytes: float  # the GPU's share of its node's
    gpus_per_node: int
    reserved_bytes: float
    fragmentation: float

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Hardware":
        """The hardware that a configuration describes.

        Raises:
            ConfigError: a fact is missing or not above zero, or an efficiency is no share.
        """
        facts = {name: getattr(cluster, name) for name in _FACTS}
        for name, value in facts.items():
            if value is None:
                rule = f"a plan needs every fact of the cluster, and {cluster.name} leaves it open"
                raise ConfigError(f"cluster.{name}", None, rule, "cluster=h800, or cluster=cpu")
        counts = {"gpus_per_node": cluster.gpus_per_node, "nics_per_node": cluster.nics_per_node}
        for name, value in (facts | counts).items():
            if value <= 0:
                raise ConfigError(f"cluster.{name}", value, "it is above zero", "cluster=h800")
        share = cluster.efficiency
        for item in fields(EfficiencyConfig):
            value = getattr(share, item.name)
            if not 0 < value <= 1:
                key, usual = f"cluster.efficiency.{item.name}", item.default
                raise ConfigError(key, value, "a share of the peak, at most 1", f"{key}={usual}")
        for name, value in (
            ("reserved_bytes", cluster.reserved_bytes),
            ("fragmentation", cluster.fragmentation),
        ):
            if value < 0:
                key = f"cluster.{name}"
                raise ConfigError(key, value, "it is not below zero", f"{key}=0")
        peak, nodes = facts["peak_flops"], cluster.gpus_per_node
        nics = cluster.nics_per_node * facts["nic_bandwidth"]
        return cls(
            name=cluster.name,
            peak=peak,
            matmul=peak * share.matmul,
            grouped_matmul=peak * share.grouped_matmul,
            attention=peak * share.attention,
            memory=facts["memory_bandwidth"] * share.memory,
            nvlink=facts["nvlink_bandwidth"] * share.nvlink,
            rdma=nics / nodes * share.rdma,
            host=facts["host_bandwidth"] * share.host,
            memory_bytes=facts["memory_bytes"],
            host_memory_bytes=facts["host_memory_bytes"] / nodes,
            gpus_per_node=nodes,
            reserved_bytes=cluster.reserved_bytes,
            fragmentation=cluster.fragmentation,
        )
