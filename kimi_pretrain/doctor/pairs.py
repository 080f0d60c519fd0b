"""Who exchanges with whom, so that a bad link shows with the rank that it belongs to.

In an all-to-all everyone waits for the slowest. In pairs only its partner does, and with another
partner that one is quick again: a rank that is slow with all its partners is slow itself.
Within a host and between hosts are two networks, measured one after the other. Between hosts the
ranks with the same place on their hosts pair up: on rails, those on the same one.
"""

from collections.abc import Sequence

Round = list[int | None]  # [ranks] each one's partner

# Partners that tell enough: of a node's 8 GPUs each meets all others.
ROUNDS = 7


def within_hosts(hosts: Sequence[str], rounds: int = ROUNDS) -> list[Round]:
    """Rounds in which ranks of one host pair up; each rank meets another one every time."""
    return _together([_meetings(ranks, rounds) for ranks in _by_host(hosts)], len(hosts))


def between_hosts(hosts: Sequence[str], rounds: int = ROUNDS) -> list[Round]:
    """Rounds in which hosts pair up, rank by rank; a rank without a counterpart rests."""
    by_host = _by_host(hosts)
    meetings = [
        [pair for one, other in meeting for pair in zip(by_host[one], by_host[other], strict=False)]
        for meeting in _meetings(range(len(by_host)), rounds)
    ]
    return _together([meetings], len(hosts))


def _by_host(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of each host, in the order in which hosts come."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def _meetings(members: Sequence[int], most: int) -> list[list[tuple[int, int]]]:
    """A round-robin tournament by the circle method, its first rounds."""
    places: list[int | None] = [*members]
    if len(places) % 2:
        places.append(None)  # whoever meets it rests
    half, rounds = len(places) // 2, []
    for _ in range(min(most, len(places) - 1)):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        places[1:] = [places[-1], *places[1:-1]]
    return rounds


def _together(tournaments: Sequence[list[list[tuple[int, int]]]], ranks: int) -> list[Round]:
    """Tournaments held at the same time, as each rank's partner in each round."""
    rounds: list[Round] = []
    for number in range(max(map(len, tournaments), default=0)):
        partners: Round = [None] * ranks
        for tournament in tournaments:
            for one, other in tournament[number] if number < len(tournament) else []:
                partners[one], partners[other] = other, one
        if any(partner is not None for partner in partners):
            rounds.append(partners)
    return rounds
