"""Copies whose waits somebody is told of: a step's time that a link to the host did not hide."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from kimi_pretrain.ops.streams import Stream, Ticket, Work

Waiting = Callable[[], AbstractContextManager[None]]  # a context around each wait


@dataclass(frozen=True)
class _TimedTicket:
    ticket: Ticket
    waiting: Waiting

    @property
    def done(self) -> bool:
        return self.ticket.done

    def wait(self) -> None:
        with self.waiting():
            self.ticket.wait()


@dataclass(frozen=True)
class TimedStream:
    """A ``Stream`` whose every wait is within a context of ``waiting``'s."""

    stream: Stream
    waiting: Waiting

    def run(self, work: Work) -> Ticket:
        return _TimedTicket(self.stream.run(work), self.waiting)

    def close(self) -> None:
        self.stream.close()
