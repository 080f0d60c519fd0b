"""Ranks on whole nodes, of a cluster or of a hostfile."""

import re

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.launch.hosts import Host, parse, place
from kimi_pretrain.launch.nodes import Nodes, nodes_of


def _nodes(*overrides: str) -> Nodes:
    return nodes_of(compose(["launcher=slurm", "run_dir=a", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("cluster=h800", "parallel.dp=32"), Nodes(4, 8)),
        (("cluster=h800", "parallel.dp=4"), Nodes(1, 4)),
        (("launcher.ranks_per_node=3", "parallel.dp=6"), Nodes(2, 3)),
        (("experiment=k2_1t_h800_2048",), Nodes(256, 8)),
    ],
)
def test_ranks_fill_nodes(overrides: tuple[str, ...], expected: Nodes) -> None:
    """Catches a node too many, and a node's GPUs that nobody uses."""
    assert _nodes(*overrides) == expected


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    """Catches a job that waits for a rank for which there is no GPU; the fix must be one."""
    with pytest.raises(ConfigError, match="whole nodes of 8") as error:
        _nodes("cluster=h800", "parallel.dp=12", "parallel.ep=4")
    match = re.search(r"parallel\.dp=(\d+): (\d+) nodes", error.value.fix)
    assert match is not None
    fixed = _nodes("cluster=h800", f"parallel.dp={match[1]}", "parallel.ep=4")
    assert fixed == Nodes(int(match[2]), 8)


def test_a_cluster_of_which_nothing_is_known_is_refused() -> None:
    """Catches eight GPUs a node by default, for a job on somebody's nodes."""
    with pytest.raises(ConfigError, match=r"try cluster=h800, or launcher.ranks_per_node=8"):
        _nodes("parallel.dp=4")


TEXT = """\
# our hosts
node-0 slots=2
me@10.0.0.7   slots=2  # the second rack

node-2.cluster slots=2
"""


def test_a_hostfile() -> None:
    """Catches a comment taken for a host, and a user taken for a part of the name."""
    hosts = parse(TEXT, "hosts")
    assert hosts == [Host("node-0", 2), Host("me@10.0.0.7", 2), Host("node-2.cluster", 2)]
    assert hosts[1].name == "10.0.0.7"
    assert place(hosts, 4, None) == (hosts[:2], Nodes(2, 2))
    assert place(hosts, 1, None) == (hosts[:1], Nodes(1, 1))
    assert place(hosts, 3, 1) == (hosts, Nodes(3, 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "hosts: got 'no host'"),
        ("-oProxyCommand=id slots=1", "hosts, line 1: got '-oProxyCommand=id slots=1'"),
        ("a slots=two", "hosts, line 1"),
        ("a; id", "hosts, line 1"),
        ("\na slots=0", "hosts, line 2: got 'a slots=0'; a host takes at least one rank"),
        ("a\nme@a", "hosts, line 2: got 'a'; a host is named once"),
    ],
)
def test_lines_that_name_no_host(text: str, says: str) -> None:
    """Catches an option of ssh's in a host's place, and a host that gets ranks twice."""
    with pytest.raises(ConfigError) as error:
        parse(text, "hosts")
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "world", "says"),
    [
        ("a\nb", 2, "slots of the hostfile: got None; how many ranks a host takes"),
        ("a slots=2\nb slots=4", 2, "slots of the hostfile: got 'a 2, b 4'"),
        ("a slots=2\nb slots=2", 3, "got '3 ranks'; the ranks of a run fill whole hosts of 2"),
        ("a slots=2\nb slots=2", 8, "and the file names 2; try 4 ranks, or 4 hosts"),
    ],
)
def test_ranks_that_do_not_fit_the_hosts(text: str, world: int, says: str) -> None:
    """Catches hosts with more ranks than slots, and ranks without a host."""
    with pytest.raises(ConfigError) as error:
        place(parse(text, "hosts"), world, None)
    assert says in str(error.value)
