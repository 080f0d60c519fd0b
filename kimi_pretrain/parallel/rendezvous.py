"""How ranks find each other, before any process group exists.

A process group that waits for a rank says nothing for minutes and then something different on
every rank. Here each rank first leaves a report under its number in torchrun's key-value
store; rank 0 reads them all and publishes one verdict, which every rank returns or raises.
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]  # TCPStore is public
    DistError,
    DistStoreError,
    TCPStore,
)
from torch.distributed.distributed_c10d import PrefixStore, Store

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.errors import FirstRankError, PeerError, first_line, named

GRACE_SECONDS = 5.0  # for a verdict to travel, once it is due
_LOOK_SECONDS = 1.0  # a wait inside the store hears no signal: it is cut into slices
_VERDICT = "verdict"


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
        facts: what must be the same on every rank, by name.

    Raises:
        PeerError: some rank did not come in time; the same line on every rank.
        ConfigError: a fact differs; the same line on every rank.
    """
    store = _connect(place, timeout)
    try:
        report = {"host": socket.gethostname(), "facts": dict(facts)}
        store.set(_key(place.rank), json.dumps(report))
        if place.rank == 0:
            verdict = _judge(store, place.world, timeout)
            store.set(_VERDICT, json.dumps(verdict))
        else:
            verdict = _await_verdict(store, timeout)
    except DistError as error:
        raise FirstRankError(f"the store of the ranks is gone: {first_line(error)}") from error
    if "missing" in verdict:
        raise PeerError(verdict["missing"])
    if "differs" in verdict:
        what, value, rule, fix = verdict["differs"]
        raise ConfigError(what, value, rule, fix)
    return store


def disagreement(facts: Sequence[Mapping[str, str]]) -> ConfigError | None:
    """The first difference between the ranks' facts, each a mapping from key to value.

    The line names the key, the most frequent value and the odd one, and the ranks that have
    the odd one.
    """
    for key in sorted({key for each in facts for key in each}):
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
            return ConfigError(f"{key} on {named(ranks[odd])}", odd, rule, fix)
    return None


def _connect(place: Place, timeout: float) -> Store:
    """The launcher's store, or rank 0's own where a launcher only set the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            rule = "ranks find each other at this address"
            raise ConfigError(name, "", rule, "torchrun, which sets it")
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            port,
            place.world,
            is_master=place.rank == 0 and not launchers,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistError as error:
        if place.rank == 0 and not launchers:
            rule = f"rank 0 opens a port there, and cannot: {first_line(error)}"
            raise ConfigError("MASTER_PORT", port, rule, "a port that is free") from error
        raise FirstRankError(
            f"nobody answered at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout:g} s: "
            "rank 0 did not start, or the network does not reach it"
        ) from error
    # A restarted set of workers must not read what the last one left behind.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"kimi_pretrain/{attempt}", store)


def _judge(store: Store, world: int, timeout: float) -> dict[str, Any]:
    """Rank 0's verdict once all have reported or the time is over; empty: go on."""
    deadline = time.monotonic() + timeout
    keys = [_key(rank) for rank in range(world)]
    while not _arrived(store, keys, deadline):
        if time.monotonic() >= deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            return {} if not missing else {"missing": _missing_line(missing, world, timeout)}
    reports = [json.loads(text) for text in store.multi_get(keys)]
    error = disagreement([report["facts"] for report in reports])
    if error is None:
        return {}
    return {"differs": [error.what, error.value, error.rule, error.fix]}


def _missing_line(missing: Sequence[int], world: int, timeout: float) -> str:
    return (
        f"{named(missing)} of {world} did not come within {timeout:g} s "
        "(parallel.timeout_seconds): see whether they started, what they printed, and whether "
        f"they reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )


def _await_verdict(store: Store, timeout: float) -> dict[str, Any]:
    """Rank 0 has as long to come as everyone; its own wait begins only then."""
    for key, seconds in ((_key(0), timeout), (_VERDICT, timeout + GRACE_SECONDS)):
        deadline = time.monotonic() + seconds
        while not _arrived(store, [key], deadline):
            if time.monotonic() >= deadline:
                raise FirstRankError(f"rank 0 did not come or decide within {seconds:g} s")
    verdict: dict[str, Any] = json.loads(store.get(_VERDICT))
    return verdict


def _arrived(store: Store, keys: list[str], deadline: float) -> bool:
    """Wait for ``keys`` a little, at most until ``deadline``; whether they are there."""
    seconds = max(0.001, min(_LOOK_SECONDS, deadline - time.monotonic()))
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except DistStoreError:
        return False
    return True


def _key(rank: int) -> str:
    return f"report/{rank}"


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(name, text, "a launcher sets it to a number", "torchrun, which does")
    return int(text)
