"""torchrun with this program's exit codes: ``python -m kimi_pretrain.launch.agent`` ARGUMENTS.

Torchrun itself ends with code 1 and a page about itself whatever its workers said. Here the
workers' own code comes out (docs/exit-codes.md), and one line only for what no worker could
say: that it was killed.
"""

import logging
import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

EXIT_PEER = 4
EXIT_SIGNALLED = 128  # plus the signal's number, as a shell says it
# Several ranks may have ended before torchrun looks. Causes come before what they cause:
# a defect or a refusal on one rank leaves the others without a peer.
_CAUSES_FIRST = (1, 2, 3, 4, 75)


def main(arguments: list[str]) -> int:
    """Run torchrun with ``arguments``; returns the ranks' exit code."""
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
        return EXIT_SIGNALLED + int(error.sigval)
    return 0


def verdict(codes: Mapping[int, int]) -> tuple[int, str]:
    """The run's exit code from those of the first ranks that failed, and a line or nothing.

    Args:
        codes: rank -> its exit code, negative for the signal that killed it.
    """
    ended = {rank: signal.Signals(-code) for rank, code in codes.items() if code < 0}
    killed = {rank: number for rank, number in ended.items() if number != signal.SIGTERM}
    if killed:
        rank = min(killed)
        hint = " (out of memory?)" if killed[rank] == signal.SIGKILL else ""
        others = f", and {len(killed) - 1} more" if len(killed) > 1 else ""
        line = f"rank {rank} was killed by {killed[rank].name}{hint}{others}; the run has ended"
        return EXIT_PEER, line
    spoken = [code for code in codes.values() if code > 0]
    if not spoken:  # a signal before the ranks could stop in order
        return EXIT_SIGNALLED + signal.SIGTERM, ""
    known = [code for code in _CAUSES_FIRST if code in spoken]
    return (known[0] if known else max(spoken)), ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
