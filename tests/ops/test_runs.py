"""Groups of rows that are multiplied together."""

from kimi_pretrain.ops.runs import Run, cheapest_runs


def test_dear_calls_are_shared_and_dear_rows_are_not_padded() -> None:
    """Catches experts of a handful of rows each with a call of its own, and large ones padded."""
    sizes = [3, 5, 100]
    assert cheapest_runs(sizes, 0.5) == (Run(0, 1, 3), Run(1, 2, 5), Run(2, 3, 100))
    assert cheapest_runs(sizes, 50.0) == (Run(0, 2, 8), Run(2, 3, 100))
    assert cheapest_runs([], 1.0) == ()
    assert Run(0, 2, 8).total == 16


def test_every_group_is_in_one_run_and_fits() -> None:
    """Catches rows that are cut off, and a group that is multiplied twice or never."""
    sizes = [(7 * n) % 31 for n in range(40)]
    runs = cheapest_runs(sizes, 20.0)
    assert [run.first for run in runs[1:]] == [run.last for run in runs[:-1]]
    assert (runs[0].first, runs[-1].last) == (0, len(sizes))
    assert all(max(sizes[run.first : run.last]) <= run.rows for run in runs)
