"""The ranks of a benchmark: processes on this machine with torchrun's environment."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns in each of ``count`` processes, in order of rank.

    Every rank computes with one thread. ``function`` lives at the top of a module.

    Raises:
        SystemExit: a rank ended without a result; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    processes = []
    pipes: list[Connection] = []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        variables = _torchrun_variables(rank, count, port)
        task = (there, variables, function, arguments)
        process = context.Process(target=_rank_main, args=task, daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            missing = [rank for rank in range(count) if rank not in results]
            ready = wait([pipes[rank] for rank in missing])
            for rank in [rank for rank in missing if pipes[rank] in ready]:
                try:
                    results[rank] = pipes[rank].recv()
                except EOFError:
                    raise SystemExit(f"rank {rank} ended without a result") from None
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(count)]


def _rank_main(
    there: Connection,
    variables: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    there.send(function(*arguments))
    there.close()


def _torchrun_variables(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
