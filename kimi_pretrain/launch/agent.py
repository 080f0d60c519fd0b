"""torchrun with this program's exit codes: ``python -m kimi_pretrain.launch.agent`` FD ARGUMENTS.

Torchrun itself ends with code 1 and a page about itself whatever its workers said. Here the
workers' own code comes out (docs/exit-codes.md), and one line only for what no worker could
say: that it was killed, or that the other nodes cannot be reached.
"""

import logging
import os
import signal
import sys
import threading

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from kimi_pretrain.config import exit_codes
from kimi_pretrain.launch.verdict import verdict


def main(watched: int, arguments: list[str]) -> int:
    """Run torchrun with ``arguments``; returns the ranks' exit code.

    ``watched`` is a pipe that ends with the process that started this one: so do the ranks.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # its parent's; inherited by the ranks
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    logging.disable(logging.CRITICAL)  # torchrun's account of who ended and whom it ended
    options = parse_args(arguments)  # type: ignore[no-untyped-call]
    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        code, line = verdict(codes)
        if line:
            sys.stderr.write(f"kimi-pretrain: {line}\n")
        return code
    except SignalException as error:
        return exit_codes.SIGNALLED + int(error.sigval)
    except (RendezvousError, DistError) as error:
        cause = " ".join(str(error.__cause__ or error).split()[:40])
        sys.stderr.write(
            f"kimi-pretrain: the nodes did not meet, or lost one another, at "
            f"{options.rdzv_endpoint}: {type(error).__name__}: {cause}\n"
        )
        return exit_codes.PEER
    return 0


def _end_with(watched: int) -> None:
    os.read(watched, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
