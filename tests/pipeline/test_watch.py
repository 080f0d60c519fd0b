"""What an observer is told of flights that end in the background."""

from time import perf_counter

from kimi_pretrain.parallel.dispatch import Flight
from kimi_pretrain.pipeline.watch import Watch
from tests.pipeline.one_rank import Operation


def test_a_flight_ends_at_the_first_look_that_finds_it_done() -> None:
    """Catches flights that are told twice or never, that lose the node they began in, and that
    end only when somebody waits."""
    told: list[tuple[str, str, str, float, float]] = []
    watch = Watch(lambda *row: told.append(row))
    first, second, begun = Operation([], "first"), Operation([], "second"), perf_counter()
    watch.node = "0F0"
    watch.flies("all-to-all", "0F0", "dispatch", begun, Flight([first, second], lambda: None))
    watch.flies("p2p", "0SEND_F0", "", begun, second)
    first.wait()
    watch.node = "0B1"
    watch.computed("0B1", "expert", begun)
    assert [row[:3] for row in told] == [("0B1", "compute", "0B1 expert")]
    second.wait()
    watch.look()
    watch.look()
    assert [row[:3] for row in told[1:]] == [
        ("0F0", "all-to-all", "0F0 dispatch"),
        ("0F0", "p2p", "0SEND_F0"),
    ]
    ends = [row[4] for row in told]
    assert all(row[3] == begun for row in told)
    assert begun <= ends[0] <= ends[1] == ends[2] <= perf_counter()


def test_nobody_is_told_nothing() -> None:
    """Catches flights, and what they hold, that are kept although nobody asks for them."""
    watch = Watch(None)
    watch.flies("p2p", "0SEND_F0", "", 0.0, Operation([], "send"))
    watch.computed("0F0", "attend", 0.0)
    assert watch._flying == []
