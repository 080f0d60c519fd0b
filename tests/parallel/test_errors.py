"""What a rank says when another one does not answer."""

import json

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.errors import PeerError, during, first_line, named, parts


def test_many_ranks_are_counted_not_listed() -> None:
    """Catches a line of two thousand numbers."""
    assert named([3]) == "rank 3"
    assert named([1, 2, 5]) == "ranks 1, 2, 5"
    assert named(range(2048)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (2048 in all)"


def test_a_refusal_travels_in_json_and_comes_back_the_same() -> None:
    """Catches a value that JSON does not know, a path say, which would end the telling rank."""
    for value in (3, "x", None, 1.5, ("a", 1)):
        error = ConfigError("what", value, "rule", "fix")
        again = ConfigError(*json.loads(json.dumps(parts(error))))
        assert str(again).startswith("what: got ")
        assert (again.rule, again.fix) == ("rule", "fix")


def test_an_error_keeps_who_speaks_and_gains_what_was_done() -> None:
    """Catches N copies of a line that rank 0 tells for all."""
    for shared in (True, False):
        words = r"^rank 1 is gone \(while counting\)$"
        with pytest.raises(PeerError, match=words) as caught, during("counting"):
            raise PeerError("rank 1 is gone", shared)
        assert caught.value.shared is shared


def test_torchs_own_words_are_cut_to_the_point() -> None:
    """Catches a page of C++ in a line for people, and an empty one."""
    said = "[../gloo/pair.cc:534] Connection closed by peer. This is typically caused by a crash"
    assert first_line(RuntimeError(f"{said}\nand a stack")) == "Connection closed by peer"
    assert first_line(RuntimeError("")) == "RuntimeError"
    assert len(first_line(RuntimeError("x" * 1000))) == 300
