import threading
from collections import deque
from collections.abc import Callable

import pytest
import torch

from kimi_pretrain.optim.threads import on_every_thread, taken


@pytest.mark.parametrize("number", [1, 3])
def test_every_item_is_taken_once_and_operations_see_one_thread(
    number: int, threads: Callable[[int], None]
) -> None:
    """Catches chunks done twice or not at all, and threads that start threads of their own."""
    threads(number)
    queue, done, seen = deque(range(500)), [], []

    def work() -> None:
        seen.append(torch.get_num_threads())
        done.extend(taken(queue))

    on_every_thread(work)
    assert sorted(done) == list(range(500))
    assert seen == [1] * number


def test_the_callers_threads_are_as_before_and_so_are_those_of_threads_to_come(
    threads: Callable[[int], None],
) -> None:
    """Catches a run whose forward passes are single-threaded after its first update."""
    threads(2)
    on_every_thread(lambda: None)
    assert torch.get_num_threads() == 2
    later: list[int] = []
    on_every_thread(lambda: None)
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_an_error_in_a_thread_reaches_the_caller(threads: Callable[[int], None]) -> None:
    """Catches an update that fails in silence and leaves half of the weights as they were."""
    threads(2)

    def work() -> None:
        raise ArithmeticError("in a thread")

    with pytest.raises(ArithmeticError, match="in a thread"):
        on_every_thread(work)
    assert torch.get_num_threads() == 2
