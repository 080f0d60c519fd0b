"""What a rank tells the launcher of its node: under which process id it can be stopped, and how
it ended where torchrun would start it again for nothing.

Torchrun's restarts are for ranks that were lost. It restarts after any code but 0, and a rank
that stopped for a signal, was refused or met a guard would only do the same again. Such a
rank leaves its code here and ends with 0.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from kimi_pretrain.config import exit_codes

RANKS_DIR = "KIMI_PRETRAIN_RANKS"  # the folder's name, in each rank's environment
IDS, EXITS = "ids", "exits"  # a file a local rank in each
STOP = "stop"  # a file that is there once ranks shall stop
_STOPPED = exit_codes.SIGNALLED + signal.SIGTERM
_FOR_NOTHING = (exit_codes.BAD_INPUT, exit_codes.GUARD, exit_codes.SIGNAL, _STOPPED)


def run_as_rank(command: Callable[[], int]) -> NoReturn:
    """Run what this process was started for as a rank, and end with its exit code.

    Python is not taken down: threads of process groups that lost a peer cannot be ended (gloo
    has no abort), and abort the process when they want a Python that is going. See World.close.
    """
    report_as_rank()
    code = settle(_STOPPED if _shall_stop() else command())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_as_rank() -> None:
    """Called first of all by a rank: say under which process id it can be stopped."""
    folder = os.environ.get(RANKS_DIR)
    if folder is not None:
        (Path(folder) / EXITS / os.environ["LOCAL_RANK"]).unlink(missing_ok=True)  # of a last start
        (Path(folder) / IDS / os.environ["LOCAL_RANK"]).write_text(str(os.getpid()))


def _shall_stop() -> bool:
    """Whether this rank was started again in place of one that the signal to stop has killed."""
    folder = os.environ.get(RANKS_DIR)
    return folder is not None and (Path(folder) / STOP).exists()


def settle(code: int) -> int:
    """The code a rank should end with, so that torchrun restarts it only where that may help."""
    folder = os.environ.get(RANKS_DIR)
    left = _number("TORCHELASTIC_MAX_RESTARTS") - _number("TORCHELASTIC_RESTART_COUNT")
    if folder is None or left <= 0 or code not in _FOR_NOTHING:
        return code
    (Path(folder) / EXITS / os.environ["LOCAL_RANK"]).write_text(str(code))
    return exit_codes.DONE


def settled_code(folder: Path) -> int | None:
    """The code that ranks of this node left, causes before consequences; None: they left none."""
    codes = {int(file.read_text()) for file in (folder / EXITS).iterdir()}
    return min(codes, default=None)


def _number(name: str) -> int:
    return int(os.environ.get(name, "0"))
