"""torchrun with this program's exit codes: ``python -m kimi_pretrain.launch.agent`` FD ARGUMENTS.

Torchrun itself ends with code 1 and a page about itself whatever its workers said. Here the
workers' own code comes out (docs/exit-codes.md), and one line only for what no worker could
say: that it was killed.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from kimi_pretrain.config import exit_codes

# Most ranks end because another one has. Causes come before what they cause: a defect, a
# refusal or a guard, then a rank that was killed, and only then the loss of a peer.
_CAUSES = (1, 2, 3)
_CONSEQUENCES = (4, 75)


def main(watched: int, arguments: list[str]) -> int:
    """Run torchrun with ``arguments``; returns the ranks' exit code.

    ``watched`` is a pipe that ends with the process that started this one: so do the ranks.
    """
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    logging.disable(logging.CRITICAL)  # torchrun's account of who ended and whom it ended
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        code, line = verdict(codes)
        if line:
            sys.stderr.write(f"kimi-pretrain: {line}\n")
        return code
    except SignalException as error:
        return exit_codes.SIGNALLED + int(error.sigval)
    return 0


def verdict(codes: Mapping[int, int]) -> tuple[int, str]:
    """The run's exit code from those of the ranks that failed, and a line or nothing.

    Args:
        codes: rank -> its exit code, negative for the signal that killed it.
    """
    spoken = {code for code in codes.values() if code > 0}
    ended = {rank: signal.Signals(-code) for rank, code in codes.items() if code < 0}
    killed = {rank: number for rank, number in ended.items() if number != signal.SIGTERM}
    causes = [code for code in _CAUSES if code in spoken]
    if killed and not causes:
        rank = min(killed)
        hint = " (out of memory?)" if killed[rank] == signal.SIGKILL else ""
        others = f", and {len(killed) - 1} more" if len(killed) > 1 else ""
        line = f"rank {rank} was killed by {killed[rank].name}{hint}{others}; the run has ended"
        return exit_codes.PEER, line
    if not spoken:  # a signal before the ranks could stop in order
        return exit_codes.SIGNALLED + signal.SIGTERM, ""
    known = [*causes, *(code for code in _CONSEQUENCES if code in spoken)]
    return (known[0] if known else max(spoken)), ""


def _end_with(watched: int) -> None:
    os.read(watched, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
