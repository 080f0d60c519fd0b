"""Work beside the compute on a CPU: a thread, in order."""

import threading

import pytest
import torch

from kimi_pretrain.ops.streams import ThreadStream, open_stream


def test_work_runs_in_order_beside_the_compute() -> None:
    """Catches work that runs where it is given, or overtakes."""
    stream = open_stream(torch.device("cpu"), "copies")
    gate, done = threading.Event(), list[str]()

    def first() -> None:
        gate.wait()
        done.append(threading.current_thread().name)

    tickets = [stream.run(first), stream.run(lambda: done.append("second"))]
    assert not any(ticket.done for ticket in tickets)
    gate.set()
    tickets[1].wait()
    assert done == ["copies", "second"]
    assert all(ticket.done for ticket in tickets)
    stream.close()


def test_an_error_is_told_to_who_waits_and_ends_nothing() -> None:
    """Catches a thread that dies silently and leaves everyone waiting."""
    stream = ThreadStream("copies")
    failing = stream.run(list[None]().pop)
    with pytest.raises(RuntimeError, match="pop from empty list"):
        failing.wait()
    stream.run(lambda: None).wait()
    stream.close()


def test_a_closed_or_forgotten_stream_has_no_thread() -> None:
    """Catches a thread for every model that was ever built."""
    before = threading.active_count()
    stream = ThreadStream("copies")
    stream.close()
    with pytest.raises(RuntimeError, match="copies is closed"):
        stream.run(lambda: None)
    forgotten = ThreadStream("copies")
    forgotten.run(lambda: None).wait()
    thread = forgotten._thread
    del forgotten
    thread.join(10)
    assert threading.active_count() == before
