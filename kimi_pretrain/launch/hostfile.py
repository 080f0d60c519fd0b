"""A run on the hosts of a file: over ssh, each host's torchrun, watched and ended from here.

ssh does not carry signals. What ends ranks in order is a byte on each host's standard input,
and its end, where this process or the connection is gone, means the same.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from kimi_pretrain.checkpoint.run_lock import hold_run_dir
from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.launch.hosts import place, read
from kimi_pretrain.launch.node import MODULE, STOP, Node
from kimi_pretrain.launch.nodes import environment_of, world_size
from kimi_pretrain.launch.quoting import shell_word, shell_words
from kimi_pretrain.launch.verdict import worst

LOOK_SECONDS = 0.2
AGAIN_SECONDS = 5.0  # before a host that failed is tried again
SSH_FAILED = 255
KILL_SECONDS = 40.0  # torchrun gives ranks 30
LEAVE_SECONDS = 120.0  # from the first host's end for good to everybody's
# A host that ended so would only do it again.
_FOR_GOOD = (exit_codes.DONE, exit_codes.BAD_INPUT, exit_codes.GUARD, exit_codes.SIGNAL)


def launch(arguments: Sequence[str], config: Config, dry_run: bool) -> int:
    """Run the ranks of ``config`` on the hosts of its file; returns their exit code.

    Raises:
        ConfigError: hosts and ranks do not fit, a value cannot be quoted, there is no such
            program as ``launcher.ssh`` names, or the run directory is in use or cannot be
            written.
    """
    run_id = f"{int(time.time())}-{os.getpid()}"
    commands = commands_of(config, arguments, Path.cwd(), run_id)
    if dry_run:
        sys.stdout.writelines(f"{shlex.join(command)}\n" for command in commands)
        return exit_codes.DONE
    _require_program(config.launcher.ssh[0])
    hold_run_dir(Path(config.run_dir)).close()
    with _stopping(RunningHosts(commands, config.launcher.max_restarts)) as hosts:
        return hosts.run()


def _require_program(name: str) -> None:
    if shutil.which(name) is None:
        rule = "a program of this machine, which reaches the hosts"
        raise ConfigError("launcher.ssh", name, rule, "launcher.ssh=[PATH], or install OpenSSH")


def commands_of(
    config: Config, arguments: Sequence[str], folder: Path, run_id: str
) -> list[list[str]]:
    """The ssh command of every host, the first host's first.

    Args:
        config: of the run, with its ``launcher`` part.
        arguments: the ranks' command line.
        folder: the working directory on every host.
        run_id: names this start, the same for all hosts.
    """
    launcher = config.launcher
    hosts, nodes = place(read(launcher.hostfile), world_size(config), launcher.ranks_per_node)
    environment = environment_of(config)
    python = launcher.python or sys.executable
    return [
        [
            *launcher.ssh,
            host.target,
            _remote(
                Node(
                    nodes=nodes.count,
                    ranks=nodes.ranks,
                    address=launcher.address or hosts[0].name,
                    port=launcher.port,
                    run_id=run_id,
                    max_restarts=launcher.max_restarts,
                    logs=str(folder / config.run_dir / "logs" / run_id),
                    name=host.name,
                    number=number,
                    watch=True,
                ),
                arguments,
                folder,
                python,
                [f"{name}={value}" for name, value in environment.items()],
            ),
        ]
        for number, host in enumerate(hosts)
    ]


def _remote(
    node: Node, arguments: Sequence[str], folder: Path, python: str, variables: Sequence[str]
) -> str:
    """What the host's shell runs."""
    words = [
        *shell_words("launcher.environment", variables),
        f"{shell_word('launcher.python', python)} -m {MODULE}",
        *shell_words("run_dir", node.arguments()),
        "--",
        *shell_words("override", arguments),
    ]
    return f"cd {shell_word('working directory', str(folder))} && exec env {' '.join(words)}"


@dataclass
class RunningHosts:
    """One ssh a host. A host that fails while others run is started again; torchrun on the
    others waits for it, and all ranks go on from the last checkpoint."""

    commands: list[list[str]]
    restarts: int
    heard: int = 0  # signals to stop
    told: int = 0  # of those, how many the hosts were told of
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)  # of hosts that do not run
    again: dict[int, float] = field(default_factory=dict)  # host -> when to start it again

    def run(self) -> int:
        """Start all, wait for all; returns the exit code that says why the run ended."""
        deadline: float | None = None
        try:
            for host in range(len(self.commands)):
                self._start(host)
            while (self.running or self.again) and self.told < 2:
                time.sleep(LOOK_SECONDS)
                self.look()
                if deadline is None and self._gone():
                    deadline = time.monotonic() + LEAVE_SECONDS
                if deadline is not None and time.monotonic() > deadline:
                    break
        finally:
            self._end()
        return worst(self.codes.values())

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. It only counts: it may come while a host is being started or told."""
        self.heard += 1

    def look(self) -> None:
        """Pass signals on, take note of hosts that ended, start those that are due again."""
        while self.told < self.heard:
            self._pass_on()
        for host, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[host]
            self._ended(host, code)
        for host, due in list(self.again.items()):
            if time.monotonic() >= due:
                del self.again[host]
                self._start(host)

    def _start(self, host: int) -> None:
        self.running[host] = subprocess.Popen(
            self.commands[host], stdin=subprocess.PIPE, start_new_session=True
        )
        self.codes.pop(host, None)

    def _pass_on(self) -> None:
        """The first signal asks every host to stop in order, the next does not ask."""
        self.again.clear()
        for process in self.running.values():
            _tell(process, None if self.told else STOP)
        self.told += 1

    def _gone(self) -> bool:
        """Whether a host has ended for good."""
        return bool(self.codes.keys() - self.again.keys())

    def _ended(self, host: int, code: int) -> None:
        # The first host holds the rendezvous: without it the others have nowhere to meet.
        final = code in _FOR_GOOD or host == 0 or self.heard > 0
        final = final or not self.restarts or not self.running or self._gone()
        self.codes[host] = _code(code)
        if not final:
            self.restarts -= 1
            self.again[host] = time.monotonic() + AGAIN_SECONDS
            target = self.commands[host][-2]
            line = f"kimi-pretrain: {target} ended with code {code}; starting it again\n"
            sys.stderr.write(line)
            return
        self.again.clear()  # the run needs all its hosts
        # The others stop by themselves where ranks left together, and have to be told else.
        if host == 0 and code not in (exit_codes.DONE, exit_codes.SIGNAL):
            for process in self.running.values():
                _tell(process, None)

    def _end(self) -> None:
        """Nobody stays: hosts that have not ended are told, and in the end not asked."""
        for process in self.running.values():
            _tell(process, None)
        deadline = time.monotonic() + KILL_SECONDS
        for host, process in self.running.items():
            try:
                code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # All of its session: what a wrapper of ssh started would hold our output open.
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
            self.codes[host] = _code(code)


def _code(code: int) -> int:
    """What a host's end counts as: one that was killed, or that ssh lost, is a lost peer."""
    return exit_codes.PEER if code < 0 or code == SSH_FAILED else code


def _tell(process: subprocess.Popen[bytes], word: bytes | None) -> None:
    """Send ``word`` to a host, or close its standard input."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        if word is None:
            process.stdin.close()
        elif not process.stdin.closed:
            process.stdin.write(word)
            process.stdin.flush()


@contextmanager
def _stopping(hosts: RunningHosts) -> Iterator[RunningHosts]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, hosts.stop) for number in numbers]
    try:
        yield hosts
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
