"""torchrun with this program's exit codes: ``python -m kimi_pretrain.launch.agent`` FD ARGUMENTS.

Torchrun itself ends with code 1 and a page about itself whatever its workers said. Here the
workers' own code comes out (docs/exit-codes.md), and one line only for what no worker could
say: that it was killed, or that the other nodes cannot be reached.
"""

import logging
import os
import re
import signal
import socket
import sys
import threading
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import api as multiprocessing
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from kimi_pretrain.config import exit_codes
from kimi_pretrain.launch.torchrun import END
from kimi_pretrain.launch.verdict import verdict

_FAILED = re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)")


def main(watched: int, arguments: list[str]) -> int:
    """Run torchrun with ``arguments``; returns the ranks' exit code.

    ``watched`` is a pipe that ends with the process that started this one: so do the ranks.
    """
    signal.signal(END, _end)
    signal.signal(signal.SIGTERM, lambda *_: None)  # its parent's; not inherited by the ranks
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # its parent's; inherited by the ranks
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    try:
        return _run(arguments)
    except SignalException as error:
        return exit_codes.SIGNALLED + int(error.sigval)


def _run(arguments: list[str]) -> int:
    options = parse_args(arguments)  # type: ignore[no-untyped-call]
    options.signals_to_handle = "SIGQUIT"  # the handlers of `main` stay: one has to be named
    if options.max_restarts == 0:
        logging.disable(logging.CRITICAL)  # torchrun's account of who ended and whom it ended
    else:
        logging.disable(logging.WARNING)
        _report_kills(options.local_addr)
    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        code, line = verdict(codes)
        if line:
            sys.stderr.write(f"kimi-pretrain: {line}\n")
        return code
    except (RendezvousError, DistError) as error:
        cause = " ".join(str(error.__cause__ or error).split()[:40])
        sys.stderr.write(
            f"kimi-pretrain: the nodes did not meet, or lost one another, at "
            f"{options.rdzv_endpoint}: {type(error).__name__}: {cause}\n"
        )
        return exit_codes.PEER
    return 0


class _Kills(logging.Handler):
    """Names a rank that was killed, of which torchrun's restart would leave no word."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host

    def emit(self, record: logging.LogRecord) -> None:
        found = _FAILED.match(record.getMessage())
        if found is not None and int(found["code"]) < 0:
            name = signal.Signals(-int(found["code"])).name
            rank = f"local rank {found['rank']}"
            sys.stderr.write(f"kimi-pretrain: {self.host}: {rank} was killed by {name}\n")


def _report_kills(address: str | None) -> None:
    host = address or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    logger = logging.getLogger(multiprocessing.__name__)
    logger.handlers, logger.propagate = [_Kills(host)], False


def _end(number: int, frame: FrameType | None) -> None:
    """As torchrun at a SIGTERM: that is what its ranks get, and a SIGKILL 30 seconds later."""
    raise SignalException("ended", sigval=signal.SIGTERM)


def _end_with(watched: int) -> None:
    os.read(watched, 1)
    os.kill(os.getpid(), END)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
