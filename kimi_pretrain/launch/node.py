"""The ranks of one node of several: ``python -m kimi_pretrain.launch.node OPTIONS -- TRAIN...``.

What Slurm's job step and the hostfile's ssh start, once a node. Torchrun's c10d rendezvous
brings the nodes together: the first node holds it. Torchrun numbers nodes in the order of
their names.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.launch.torchrun import run_ranks

MODULE = "kimi_pretrain.launch.node"
STOP = b"s"  # on standard input: ranks checkpoint and end; its end means the same
_DEFAULTS = {
    # Each meeting of the nodes opens a store of its own, so that a node that was replaced, which
    # knows nothing of earlier meetings, finds the others.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # A node that waits for the first one to come up would print a warning a second.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Node:
    """One node's part of a job.

    ``nodes`` x ``ranks`` is the world. ``run_id`` names the job's start, the same on every
    node. ``name`` is the host's address for the others, where its own name will not do.
    """

    nodes: int
    ranks: int
    address: str
    port: int
    run_id: str
    max_restarts: int
    logs: str
    name: str | None = None
    number: int | None = None  # None: Slurm's SLURM_NODEID says
    watch: bool = False  # standard input tells when to stop

    def arguments(self) -> list[str]:
        """The command line that ``parse`` reads."""
        return [
            f"--nodes={self.nodes}",
            f"--ranks={self.ranks}",
            f"--address={self.address}",
            f"--port={self.port}",
            f"--run-id={self.run_id}",
            f"--max-restarts={self.max_restarts}",
            f"--logs={self.logs}",
            *([f"--name={self.name}"] if self.name is not None else []),
            *([f"--number={self.number}"] if self.number is not None else []),
            *(["--watch"] if self.watch else []),
        ]

    def torchrun(self, first: bool, host: str) -> list[str]:
        """torchrun's options on this node; the ``first`` one holds the rendezvous."""
        return [
            f"--nnodes={self.nodes}",
            f"--nproc-per-node={self.ranks}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address}:{self.port}",
            f"--rdzv-id={self.run_id}",
            f"--rdzv-conf=is_host={int(first)}",
            f"--max-restarts={self.max_restarts}",
            f"--log-dir={self.logs}/{host}",
            "--tee=3",
            *([f"--local-addr={self.name}"] if self.name is not None else []),
        ]


def parse(argv: Sequence[str]) -> tuple[Node, list[str]]:
    """The node and the ranks' command line after ``--``."""
    cut = list(argv).index("--")
    parser = argparse.ArgumentParser(MODULE, allow_abbrev=False)
    for name in ("nodes", "ranks", "port", "max-restarts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("address", "run-id", "logs"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--name")
    parser.add_argument("--number", type=int)
    parser.add_argument("--watch", action="store_true")
    return Node(**vars(parser.parse_args(argv[:cut]))), list(argv[cut + 1 :])


def main(argv: Sequence[str]) -> int:
    """Run this node's ranks; returns their exit code."""
    node, arguments = parse(argv)
    number = node.number if node.number is not None else int(os.environ["SLURM_NODEID"])
    host = node.name or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        _prepare(node, first=number == 0, host=host)
    except ConfigError as error:
        sys.stderr.write(f"kimi-pretrain: {host}: {error}\n")
        return exit_codes.BAD_INPUT
    options = node.torchrun(number == 0, host)
    hearing = threading.Thread(target=_watch, daemon=True).start if node.watch else None
    return run_ranks("kimi_pretrain.train", arguments, options, _DEFAULTS, hearing)


def _prepare(node: Node, first: bool, host: str) -> None:
    try:
        Path(node.logs, host).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"every node writes its ranks' logs there ({error.strerror})"
        fix = "run_dir=DIR on a file system that all nodes share"
        raise ConfigError("run_dir", node.logs, rule, fix) from error
    if first:
        require_free_port(node.port)


def require_free_port(port: int) -> None:
    """Raise ConfigError where another program listens on ``port`` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return
        except OSError as error:
            reason = error.strerror
    with socket.socket() as other:
        other.bind(("", 0))
        free = other.getsockname()[1]
    rule = f"the first node holds the rendezvous at this port ({reason})"
    raise ConfigError("launcher.port", port, rule, f"launcher.port={free}, which is free there")


def _watch() -> None:
    """Pass on what standard input says, as the signals that ``run_ranks`` hears."""
    while True:
        told = os.read(0, 1)
        os.kill(os.getpid(), signal.SIGUSR1 if told == STOP else signal.SIGINT)
        if told != STOP:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
