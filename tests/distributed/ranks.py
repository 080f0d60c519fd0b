"""Real ranks for tests: processes with torchrun's environment, over loopback.

``run_ranks(4, function, *arguments)`` calls ``function(rank, world, *arguments)`` in four
processes and returns their four results. ``function`` lives at the top of a test module, so
that a child finds it by name. Children are forked from a server that has torch loaded.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["kimi_pretrain.parallel.world", "tests.distributed.ranks"])


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 120.0,
    lost: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Every rank's result, in order.

    Args:
        world: how many ranks.
        function: called as ``function(rank, world, *arguments)`` in each.
        arguments: plain values or tensors; pickled.
        timeout: seconds after which every rank is ended and an AssertionError raised.
        lost: ranks that are meant to die without a result; theirs is None.
        environment: more variables for every rank.

    Raises:
        AssertionError: a rank raised (its traceback is shown), died, or was too slow.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    message = pickle.dumps((function, arguments))
    ranks: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(world):
            variables = _torchrun_variables(rank, world, store.port) | (environment or {})
            ours, theirs = _SERVER.Pipe()
            process = _SERVER.Process(target=_rank_main, args=(theirs, variables), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        for rank, (_, ours) in enumerate(ranks):
            if rank not in lost:
                ours.send_bytes(message)
            else:
                with suppress(BrokenPipeError):
                    ours.send_bytes(message)
        return _collect(ranks, lost, time.monotonic() + timeout)
    finally:
        for process, ours in ranks:
            process.kill()
            process.join()
            ours.close()


def _collect(
    ranks: list[tuple[BaseProcess, Connection]], lost: tuple[int, ...], deadline: float
) -> list[Any]:
    results: dict[int, Any] = {}
    number = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while number:
        ready = wait(list(number), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(number.values())} gave no result in time"
        for connection in ready:
            rank = number.pop(connection)  # type: ignore[call-overload]
            try:
                kind, value = connection.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                process = ranks[rank][0]
                process.join(10)
                assert rank in lost, f"rank {rank} ended with exit code {process.exitcode}"
                results[rank] = None
                continue
            assert kind == "result", f"rank {rank} raised\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours, as it is torchrun's
        "OMP_NUM_THREADS": "1",
    }


def _rank_main(connection: Connection, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        function, arguments = connection.recv()
        value = function(int(variables["RANK"]), int(variables["WORLD_SIZE"]), *arguments)
        # Plain pickle: multiprocessing's own would pass a tensor as a handle into a process
        # that is about to end.
        connection.send_bytes(pickle.dumps(("result", value)))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        connection.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        raise SystemExit(1) from None
    finally:
        connection.close()
        if dist.is_initialized():
            dist.destroy_process_group()
