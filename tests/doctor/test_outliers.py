"""Who is slow, by made-up times."""

from kimi_pretrain.doctor.outliers import outliers

HOSTS = ["a", "a", "b", "b"]


def test_the_slow_rank_is_named_with_its_host() -> None:
    """Catches a rank held against the mean, which it moves itself, and a host off by one."""
    (found,) = outliers("matmul", [1.0, 1.02, 1.0, 9.0], HOSTS)
    assert (found.probe, found.rank, found.host, found.ratio) == ("matmul", 3, "b", 9.0)


def test_a_tenth_is_slow_and_less_is_not() -> None:
    """Catches a threshold on the wrong side."""
    assert [o.rank for o in outliers("copy", [1.0, 1.1, 1.09, 1.0], HOSTS)] == [1]


def test_of_two_ranks_one_can_be_slow() -> None:
    """Catches a median of two that hides the slow one."""
    assert [o.rank for o in outliers("copy", [2.0, 1.0], ["a", "b"])] == [0]


def test_whoever_had_no_part_is_left_out() -> None:
    """Catches a missing time that counts as nought, the quickest of all."""
    assert [o.rank for o in outliers("copy", [None, 1.0, 1.0, 2.0], HOSTS)] == [3]
    assert outliers("copy", [None, None, None, 2.0], HOSTS) == []


def test_the_worst_comes_first() -> None:
    """Catches a line cut after sixteen ranks of which the worst is the last."""
    assert [o.rank for o in outliers("copy", [2.0, 1.0, 3.0, 1.0, 1.0], [*HOSTS, "c"])] == [2, 0]
