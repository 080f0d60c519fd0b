"""Work that runs beside the computation, in order, on whatever device there is.

Three kinds of work run at once. *Compute* is what the program calls: the current stream of a
GPU, this thread on a CPU. *Communication* has the stream that its process group owns (NCCL's,
DeepEP's; gloo's threads), reached by ``parallel.collectives``. *Copies* between device and host
get a ``Stream`` of their own here: a stream of the GPU, or a thread, so that a missing wait
computes wrong numbers on a CPU too.

A ``Ticket`` is where the three meet, and has the two questions that a ``collectives.Handle``
answers: ``done``, and ``wait``, after which the compute may use the result.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]


class Ticket(Protocol):
    """A piece of work on a stream."""

    @property
    def done(self) -> bool:
        """Whether it has ended, seen from the host."""
        ...

    def wait(self) -> None:
        """What the compute is given from now on runs after the work.

        Raises:
            RuntimeError: the work failed.
        """
        ...


class Stream(Protocol):
    """Runs work in the order in which it came, beside the compute."""

    def run(self, work: Work) -> Ticket:
        """Begin ``work`` once all that the compute was given so far is done."""
        ...

    def close(self) -> None:
        """Return when all work has ended; nothing can be run afterwards."""
        ...


def open_stream(device: torch.device, name: str) -> Stream:
    """A stream beside the compute on ``device``; ``name`` is its thread's on a CPU."""
    if device.type in ("cpu", "meta"):
        return ThreadStream(name)
    return DeviceStream(device)


class _Done:
    """The ticket of a thread's work."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.error: BaseException | None = None

    def set(self) -> None:
        self._event.set()

    @property
    def done(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        self._event.wait()
        if self.error is not None:
            raise RuntimeError(f"work beside the compute failed: {self.error}") from self.error


class ThreadStream:
    """A thread. What the compute was given is done when ``run`` is called: a CPU computes at once.

    torch releases the interpreter while it copies, so that copies run under the compute.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Work, _Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work_off, args=(self._queue,), name=name, daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._queue.put, None)

    def run(self, work: Work) -> Ticket:
        if not self._finalizer.alive:
            raise RuntimeError(f"{self._thread.name} is closed")
        ticket = _Done()
        self._queue.put((work, ticket))
        return ticket

    def close(self) -> None:
        self._finalizer()
        self._thread.join()


def _work_off(tasks: "queue.SimpleQueue[tuple[Work, _Done] | None]") -> None:
    """What the thread does; a function, so that the thread does not keep its stream alive."""
    while (task := tasks.get()) is not None:
        work, ticket = task
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            ticket.error = error
        finally:
            ticket.set()
        del task, work, ticket  # what was copied is not kept until the next copy


class _Recorded:
    """The ticket of a device stream's work."""

    def __init__(self, event: torch.Event) -> None:
        self._event = event

    @property
    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        torch.accelerator.current_stream().wait_event(self._event)


class DeviceStream:
    """A stream of an accelerator beside its current one (compiled, not run: docs/gpu.md)."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.Stream(device)

    def run(self, work: Work) -> Ticket:
        self._stream.wait_stream(torch.accelerator.current_stream())
        with self._stream:
            work()
        return _Recorded(self._stream.record_event())

    def close(self) -> None:
        self._stream.synchronize()
