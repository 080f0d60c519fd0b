"""Independent work on CPU threads, each running its operations alone.

torch gives an operation to all threads and waits for the slowest, every few dozen
microseconds in Newton-Schulz on small matrices. Here threads take whole chunks: nothing
waits until the queue is empty, which matters most where cores are shared, and since every
operation sees one thread, results do not depend on how many there are.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def on_every_thread(work: Callable[[], None]) -> None:
    """Call `work` once on each of as many threads as torch uses, with one for itself.

    Autograd's and autocast's modes are those of new threads: gradients on, no autocast.
    The first exception is raised again here once all threads have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        work()
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            calls = [pool.submit(work) for _ in range(threads)]
        for call in calls:
            call.result()
    finally:
        # A thread's setting is also the default of threads to come: put the caller's back.
        torch.set_num_threads(threads)


def taken(queue: deque[T]) -> Iterator[T]:
    """Items off a queue that several threads empty together."""
    while True:
        try:
            item = queue.popleft()
        except IndexError:
            return
        yield item
