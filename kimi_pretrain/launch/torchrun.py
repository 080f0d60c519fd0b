"""The ranks of one machine: torchrun, started, signalled and ended from here.

The parent stays a light process without torch. Torchrun runs in a session of its own, so
that a terminal's Ctrl-C reaches it once, from here. A signal to stop goes to the ranks
themselves: they checkpoint and end in their own time, while torchrun would kill them after 30
seconds. Each rank leaves its process id in a folder for that (``rank.py``).
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from kimi_pretrain.config import exit_codes
from kimi_pretrain.launch.rank import EXITS, IDS, RANKS_DIR, STOP, settled_code

# SIGUSR1 is Slurm's before a time limit. Some of its plugins send it to every process of a
# job step, so that it must mean nothing to torchrun and its ranks.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Tells torchrun to end its ranks. SIGTERM does not: at a job's end Slurm sends that to every
# process, and ranks would be killed 30 seconds later, whatever Slurm's KillWait.
END = signal.SIGHUP
_DEFAULTS = {"OMP_NUM_THREADS": "1"}  # one thread a rank: the same bits


def run_ranks(
    module: str,
    arguments: Sequence[str],
    options: Sequence[str],
    defaults: Mapping[str, str] | None = None,
    hearing: Callable[[], None] | None = None,
) -> int:
    """Run ``torchrun OPTIONS -m module arguments``; returns the ranks' exit code.

    The first SIGTERM, SIGINT or SIGUSR1 is passed on to every rank as SIGTERM; a SIGINT after
    it ends them within torchrun's 30 seconds whatever they do. No process is left behind, not
    even where this one is killed: torchrun holds the other end of a pipe.

    Args:
        module: what a rank runs.
        arguments: its command line.
        options: torchrun's own: how many ranks, on how many nodes.
        defaults: variables of the ranks' environment that this process's may override.
        hearing: called once signals are passed on, before torchrun is started.
    """
    with tempfile.TemporaryDirectory(prefix="kimi_pretrain-") as temporary:
        folder = Path(temporary) / "ranks"
        for name in (IDS, EXITS):
            (folder / name).mkdir(parents=True)
        variables = {**_DEFAULTS, **(defaults or {}), **os.environ, RANKS_DIR: str(folder)}
        logs = [] if any(option.startswith("--log-dir") for option in options) else [temporary]
        torchrun = [*options, *(f"--log-dir={path}/logs" for path in logs)]
        watched, held = os.pipe()  # closes with this process, whatever ends it
        agent = [sys.executable, "-m", "kimi_pretrain.launch.agent", str(watched)]
        with _passing_on(folder) as passing:
            if hearing is not None:
                hearing()
            process = subprocess.Popen(
                [*agent, *torchrun, "-m", module, *arguments],
                env=variables,
                start_new_session=True,
                pass_fds=(watched,),
            )
            os.close(watched)
            try:
                passing.to(process)
                code = process.wait()
            finally:
                os.close(held)
                if process.returncode is None or process.returncode < 0:
                    _kill(process, folder)
        settled = settled_code(folder)
    if passing.asked and -code in (END, signal.SIGTERM):  # torchrun was still being started
        return exit_codes.SIGNALLED + signal.SIGTERM
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(f"kimi-pretrain: torchrun was killed by {name}; its ranks have ended\n")
        return exit_codes.PEER
    return settled if code == exit_codes.DONE and settled is not None else code


class _Passing:
    """Passes the first signal to stop on to the ranks, and a SIGINT after it to torchrun too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agent: subprocess.Popen[bytes] | None = None
        self.asked = False

    def to(self, agent: subprocess.Popen[bytes]) -> None:
        """From now on there is someone to hear; a signal that came before is passed on."""
        self.agent = agent
        if self.asked:
            agent.send_signal(END)

    def handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        # Before the look: a rank leaves its id, and then looks for this.
        (self.folder / STOP).touch()
        if self.agent is None or (again and number != signal.SIGINT):
            return
        ranks = _living(self.folder)
        if again or not ranks:
            self.agent.send_signal(END)
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGINT if again else signal.SIGTERM)


@contextmanager
def _passing_on(folder: Path) -> Iterator[_Passing]:
    passing = _Passing(folder)
    handlers = dict.fromkeys(STOP_SIGNALS, passing.handle)
    if signal.getsignal(END) == signal.SIG_IGN:  # nohup's, which torchrun would start with
        handlers[END] = lambda *_: None
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield passing
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _kill(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """End what is left where torchrun could not: ranks lead process groups of their own."""
    agent.kill()
    agent.wait()
    for process in _living(folder):
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def _living(folder: Path) -> list[int]:
    """Process ids of the ranks that run; torchrun may have restarted them, and does so now."""
    texts = [file.read_text() for file in (folder / IDS).iterdir()]
    ids = [int(text) for text in texts if text]  # empty: being written just now
    return [process for process in ids if Path(f"/proc/{process}").exists()]
