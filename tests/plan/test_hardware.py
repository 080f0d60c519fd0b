"""Facts of clusters, and what a plan makes of them."""

from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.composition import conf_dir, group_options
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.plan.hardware import Hardware

CLUSTERS = [name for name in group_options(conf_dir())["cluster"] if name != "local"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_can_be_planned_and_says_where_from(name: str) -> None:
    """Catches a fact left out, and a file without a source."""
    cluster = compose([f"cluster={name}"]).cluster
    assert Hardware.of(cluster).name == name
    assert len(cluster.source) > 10


def test_a_cluster_of_ones_own_brings_what_was_measured(tmp_path: Path) -> None:
    """Catches measured efficiencies that a file cannot carry, or facts that it has to repeat."""
    (tmp_path / "cluster").mkdir()
    own = "defaults: [h800]\nname: ours\nefficiency: {matmul: 0.69, memory: 0.78}\n"
    (tmp_path / "cluster" / "ours.yaml").write_text(own)
    h = Hardware.of(compose([f"hydra.searchpath=[{tmp_path}]", "cluster=ours"]).cluster)
    assert h.matmul == pytest.approx(989e12 * 0.69)
    assert h.memory == pytest.approx(3.35e12 * 0.78)
    assert h.attention == pytest.approx(989e12 * 0.50)


def test_rates_are_facts_times_efficiencies() -> None:
    """Catches bits taken for bytes, both directions for one, and a node's NICs for a GPU's."""
    h = Hardware.of(compose(["cluster=h800", "cluster.efficiency.rdma=0.5"]).cluster)
    assert h.matmul == pytest.approx(989e12 * 0.72)
    assert h.rdma == pytest.approx(25e9)
    assert h.nvlink == pytest.approx(160e9)
    assert h.host_memory_bytes == pytest.approx(250e9)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cluster=local", r"cluster\.peak_flops: got None; .*; try cluster=h800"),
        ("cluster.efficiency.matmul=1.2", r"cluster\.efficiency\.matmul: got 1\.2; .*=0\.72"),
        ("cluster.efficiency.rdma=0", r"cluster\.efficiency\.rdma"),
        ("cluster.nics_per_node=0", r"cluster\.nics_per_node"),
        ("cluster.nic_bandwidth=-1", r"cluster\.nic_bandwidth"),
        ("cluster.fragmentation=-0.1", r"cluster\.fragmentation"),
    ],
)
def test_what_is_no_cluster_is_refused(override: str, says: str) -> None:
    """Catches a division by zero, and a plan of unknown facts."""
    overrides = [override] if override == "cluster=local" else ["cluster=h800", override]
    with pytest.raises(ConfigError, match=says):
        Hardware.of(compose(overrides).cluster)
