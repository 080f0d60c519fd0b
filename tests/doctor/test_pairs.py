"""Rounds of exchanges, as pure arithmetic."""

from itertools import combinations

import pytest

from kimi_pretrain.doctor.pairs import Round, between_hosts, within_hosts


def met(rounds: list[Round]) -> list[tuple[int, int]]:
    """Every pair of every round, once; partners must agree."""
    pairs = []
    for partners in rounds:
        for rank, partner in enumerate(partners):
            if partner is not None:
                assert partners[partner] == rank != partner
                pairs.append((min(rank, partner), max(rank, partner)))
    assert len(pairs) == 2 * len(set(pairs)), "a pair met twice"
    return sorted(set(pairs))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_each_rank_of_a_node_meets_every_other(size: int) -> None:
    """Catches a link that no round uses, and a rank with two partners at once."""
    assert met(within_hosts(["a"] * size)) == list(combinations(range(size), 2))


def test_hosts_of_any_size_meet_within_themselves_at_the_same_time() -> None:
    """Catches hosts that wait for one another's rounds, and pairs across hosts."""
    hosts = ["a", "b", "b", "a", "b", "c"]
    rounds = within_hosts(hosts)
    assert met(rounds) == [(0, 3), (1, 2), (1, 4), (2, 4)]
    assert len(rounds) == 3


def test_between_hosts_ranks_meet_their_counterparts() -> None:
    """Catches an exchange over another rail, and one within a host."""
    hosts = ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    assert met(between_hosts(hosts)) == [(0, 2), (0, 4), (1, 3), (1, 5), (2, 4), (3, 5)]


def test_two_thousand_ranks_take_seven_rounds() -> None:
    """Catches a tournament of all against all, which would take 255 rounds."""
    hosts = [f"node-{rank // 8}" for rank in range(2048)]
    rounds = between_hosts(hosts)
    assert len(rounds) == 7
    assert len(met(rounds)) == 7 * 1024


def test_one_host_has_nobody_to_meet() -> None:
    """Catches rounds in which everyone rests."""
    assert between_hosts(["a", "a", "a"]) == []
    assert within_hosts(["a", "b"]) == []
