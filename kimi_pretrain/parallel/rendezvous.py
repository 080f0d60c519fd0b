"""How ranks find each other, before any process group exists.

A process group that waits for a rank says nothing for minutes and then something different on
every rank. Here each rank first leaves a report under its number in torchrun's key-value
store; rank 0 reads them all and publishes one verdict, which every rank returns or raises. A
rank that cannot run, its configuration being wrong, comes too and reports that.

A report is the digest of what must be the same everywhere, 32 bytes: 4,096 ranks give rank 0
128 KiB to read. The facts themselves lie in the store under their digest, once for all ranks
that have them, and are read only where digests differ.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from itertools import count
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]  # TCPStore is public
    DistError,
    TCPStore,
)
from torch.distributed.distributed_c10d import PrefixStore, Store

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.errors import (
    PeerError,
    SharedConfigError,
    first_line,
    named,
    parts,
)

GRACE_SECONDS = 5.0  # for a verdict to travel, once it is due
REFUSAL_SECONDS = 60.0  # by which a rank's start may lie behind that of one that is refused
LONGEST_PAUSE_SECONDS = 0.5  # between two looks: 4,096 ranks ask the store 8,000 times a second
_VERDICT, _HEARD, _REFUSED = "verdict", "heard", "refused"
_MEETINGS = count()  # every rank of a run holds as many


@dataclass(frozen=True)
class Place:
    """What the launcher told this process about itself."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "Place":
        """The place in RANK, WORLD_SIZE and LOCAL_RANK; one process alone without them.

        Raises:
            ConfigError: some but not all of them are there, or they are no such numbers.
        """
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls()
        rank, world = _number("RANK"), _number("WORLD_SIZE")
        if rank >= world:
            rule = f"ranks count from 0 to below WORLD_SIZE={world}"
            raise ConfigError("RANK", rank, rule, "torchrun, which sets both")
        return cls(rank, world, _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank)


def meet(place: Place, timeout: float, facts: Mapping[str, str]) -> Store:
    """Wait until every rank is here and agrees on ``facts``; returns the store they share.

    Args:
        place: this rank's place in a world of two or more.
        timeout: seconds to wait for the others.
        facts: what must be the same on every rank, by name, the most telling first: of several
            that differ the first is named.

    Raises:
        PeerError: some rank did not come in time; the same line on every rank.
        ConfigError: a fact differs, or a rank refused; the same line on every rank.
    """
    store = _connect(place, timeout)
    try:
        _report(store, place.rank, facts)
        if place.rank == 0:
            verdict = _judge(store, place.world, timeout)
            _publish(store, verdict)
            if "refused" in verdict:  # who starts later comes for it too
                _let_hear(store, place.world - 1, REFUSAL_SECONDS)
            elif verdict:
                came = sum(store.check([_key(rank)]) for rank in range(1, place.world))
                _let_hear(store, came, GRACE_SECONDS)
        else:
            verdict = _await_verdict(store, timeout)
            store.add(_HEARD, 1)
    except DistError as error:
        raise PeerError(f"the store of the ranks is gone: {first_line(error)}") from error
    if "missing" in verdict:
        raise PeerError(verdict["missing"], shared=True)
    if "refused" in verdict:
        what, value, rule, fix = verdict["refused"]
        raise SharedConfigError(what, value, rule, fix)
    return store


def refuse(place: Place, error: ConfigError) -> bool:
    """Come to where the others ``meet``, or refuse as well, and say that this rank cannot run.

    Rank 0 stays until all have heard, or for ``REFUSAL_SECONDS``; another rank waits as long for
    rank 0's verdict, which may be its own refusal. Who has met the others does not come again:
    they wait for it elsewhere.

    Returns:
        Whether rank 0 speaks for this rank.
    """
    if _store.cache_info().currsize:
        return False
    try:
        store = _connect(place, REFUSAL_SECONDS)
        if place.rank == 0:
            store.set(_key(0), _REFUSED)
            _publish(store, {"refused": parts(error)})
            _let_hear(store, place.world - 1, REFUSAL_SECONDS)
        else:
            what, *rest = parts(error)
            told = [f"{what} on {named([place.rank])}", *rest]
            store.compare_set(_REFUSED, "", json.dumps(told))  # the first one is enough
            store.set(_key(place.rank), _REFUSED)
            _await_verdict(store, REFUSAL_SECONDS)
            store.add(_HEARD, 1)
    except (ConfigError, PeerError, DistError):
        return False
    return True


def disagreement(facts: Sequence[Mapping[str, str]]) -> SharedConfigError | None:
    """The first difference between the ranks' facts, each a mapping from key to value.

    Keys are compared in the order in which the ranks have them. The line names the key, the
    most frequent value and the odd one, and the ranks that have the odd one.
    """
    for key in dict.fromkeys(key for each in facts for key in each):
        ranks: dict[str, list[int]] = {}  # value -> the ranks that have it
        for rank, each in enumerate(facts):
            ranks.setdefault(each.get(key, "nothing"), []).append(rank)
        if len(ranks) > 1:
            usual, odd = sorted(ranks, key=lambda value: -len(ranks[value]))[:2]
            rule = (
                f"every rank must have the same, and {named(ranks[usual])} "
                f"{'has' if len(ranks[usual]) == 1 else 'have'} {usual}"
            )
            fix = "one installation and one command line for all ranks"
            return SharedConfigError(f"{key} on {named(ranks[odd])}", odd, rule, fix)
    return None


def _connect(place: Place, timeout: float) -> Store:
    """The launcher's store, or rank 0's own where a launcher only set the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            rule = "ranks find each other at this address"
            raise ConfigError(name, "", rule, "torchrun, which sets it")
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = place.rank == 0 and not launchers
    if not serves and not _wait_until(lambda: _answers(host, port), timeout):
        raise PeerError(
            f"nobody answered at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout:g} s: "
            "rank 0 did not start, or the network does not reach it"
        )
    try:
        store = _store(host, port, place.world, serves, timeout)
    except DistError as error:
        rule = f"the ranks' store is at this port of {host}: {first_line(error)}"
        raise ConfigError("MASTER_PORT", port, rule, "a port that is free") from error
    # Restarted workers, and the next job of a sweep, must not read what was left behind. A store
    # of rank 0's own is new at each start, and of those on a node that was replaced nobody else
    # counts the same.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if launchers else "0"
    return PrefixStore(f"kimi_pretrain/{attempt}/{next(_MEETINGS)}", store)


@cache
def _store(host: str, port: int, world: int, serves: bool, timeout: float) -> Store:
    """The connection to the store, kept for the life of the process: others may need it."""
    store: Store = TCPStore(
        host,
        port,
        world,
        is_master=serves,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return store


def _report(store: Store, rank: int, facts: Mapping[str, str]) -> None:
    """Leave this rank's report, and before it what the report stands for."""
    text = json.dumps(dict(facts))
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if not store.check([_facts_key(digest)]):
        store.set(_facts_key(digest), text)
    store.set(_key(rank), digest)


def _judge(store: Store, world: int, timeout: float) -> dict[str, Any]:
    """Rank 0's verdict once all have reported, one refuses or the time is over; empty: go on."""
    keys = [_key(rank) for rank in range(world)]
    all_came = _wait_until(lambda: store.check([_REFUSED]) or store.check(keys), timeout)
    if store.check([_REFUSED]):
        return {"refused": json.loads(store.get(_REFUSED))}
    if not all_came:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:  # none: the last one came just now
            return {"missing": _missing_line(missing, world, timeout)}
    digests = [digest.decode() for digest in store.multi_get(keys)]
    distinct = sorted(set(digests))
    if len(distinct) == 1:
        return {}
    texts = store.multi_get([_facts_key(digest) for digest in distinct])
    facts = dict(zip(distinct, map(json.loads, texts), strict=True))
    error = disagreement([facts[digest] for digest in digests])
    if error is None:  # the same facts in another order
        return {}
    return {"refused": parts(error)}


def _publish(store: Store, verdict: dict[str, Any]) -> None:
    store.set(_VERDICT, json.dumps(verdict))


def _let_hear(store: Store, ranks: int, seconds: float) -> None:
    """The store may end with this process: wait until so many have heard its verdict."""
    _wait_until(lambda: store.add(_HEARD, 0) >= ranks, seconds)


def _missing_line(missing: Sequence[int], world: int, timeout: float) -> str:
    return (
        f"{named(missing)} of {world} did not come within {timeout:g} s "
        "(parallel.timeout_seconds): see whether they started, what they printed, and whether "
        f"they reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )


def _await_verdict(store: Store, timeout: float) -> dict[str, Any]:
    """Rank 0 has as long to come as everyone; its own wait begins only then."""
    for key, seconds in ((_key(0), timeout), (_VERDICT, timeout + GRACE_SECONDS)):
        if not _wait_until(partial(store.check, [key]), seconds):
            raise PeerError(f"rank 0 did not come or decide within {seconds:g} s")
    verdict: dict[str, Any] = json.loads(store.get(_VERDICT))
    return verdict


def _wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Look until it holds, ever less often; whether it did in time.

    Torch's own waits print warnings from C++ when they end without success, and hear no
    signal while they last.
    """
    deadline, pause = time.monotonic() + seconds, 0.005
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)
    return True


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=LONGEST_PAUSE_SECONDS).close()
    except OSError:
        return False
    return True


def _key(rank: int) -> str:
    return f"report/{rank}"


def _facts_key(digest: str) -> str:
    return f"facts/{digest}"


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(name, text, "a launcher sets it to a number", "torchrun, which does")
    return int(text)
