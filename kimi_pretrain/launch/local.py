"""All ranks of a run on this machine: torchrun, started, signalled and ended from here.

The parent stays a light process without torch. Torchrun runs in a session of its own, so
that a terminal's Ctrl-C reaches it once, from here. A signal to stop goes to the ranks
themselves: they checkpoint and end in their own time, while torchrun would kill them after 30
seconds. Each rank leaves its process id in a folder for that.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from kimi_pretrain.config import exit_codes

RANKS_DIR = "KIMI_PRETRAIN_RANKS"  # the folder's name, in each rank's environment
_STOP = (signal.SIGTERM, signal.SIGINT)


def launch(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m module arguments`` as so many ranks; returns their exit code.

    SIGTERM or SIGINT is passed on to every rank as SIGTERM; a second one ends them within
    torchrun's 30 seconds whatever they do. No process is left behind, not even where this
    one is killed: torchrun holds the other end of a pipe.
    """
    with tempfile.TemporaryDirectory(prefix="kimi_pretrain-") as temporary:
        folder = Path(temporary) / "ranks"
        folder.mkdir()
        environment = os.environ | {RANKS_DIR: str(folder)}
        environment.setdefault("OMP_NUM_THREADS", "1")  # one thread a rank: the same bits
        torchrun = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={temporary}/logs"]
        torchrun += ["-m", module, *arguments]
        watched, held = os.pipe()  # closes with this process, whatever ends it
        agent = subprocess.Popen(
            [sys.executable, "-m", "kimi_pretrain.launch.agent", str(watched), *torchrun],
            env=environment,
            start_new_session=True,
            pass_fds=(watched,),
        )
        os.close(watched)
        try:
            with _passing_on(agent, folder):
                code = agent.wait()
        finally:
            os.close(held)
            if agent.returncode is None or agent.returncode < 0:
                _kill(agent, folder)
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(f"kimi-pretrain: torchrun was killed by {name}; its ranks have ended\n")
        return exit_codes.PEER
    return code


def report_as_rank() -> None:
    """Called first of all by a rank: say under which process id it can be stopped."""
    folder = os.environ.get(RANKS_DIR)
    if folder is not None:
        (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))


@contextmanager
def _passing_on(agent: subprocess.Popen[bytes], folder: Path) -> Iterator[None]:
    """Pass the first signal to stop on to the ranks, any further one to torchrun."""
    stopping = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        ranks = _rank_ids(folder)
        if stopping or not ranks:
            agent.send_signal(signal.SIGTERM)
        else:
            for process in ranks:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        stopping = True

    previous = [signal.signal(number, handle) for number in _STOP]
    try:
        yield
    finally:
        for number, handler in zip(_STOP, previous, strict=True):
            signal.signal(number, handler)


def _kill(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """End what is left where torchrun could not: ranks lead process groups of their own."""
    agent.kill()
    agent.wait()
    for process in _rank_ids(folder):
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def _rank_ids(folder: Path) -> list[int]:
    texts = [file.read_text() for file in folder.iterdir()]
    return [int(text) for text in texts if text]  # empty: being written just now
