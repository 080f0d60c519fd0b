from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry import recorded
from kimi_pretrain.telemetry.jsonl import JsonlSink
from kimi_pretrain.telemetry.recorded import read_run

MakeRun = Callable[..., Path]
FIVES = [5, 10, 15, 20]


def test_rows_become_columns(make_run: MakeRun) -> None:
    run = read_run(make_run(steps=20, layers=3, heads=2, experts=8, evaluate_every=5))
    assert run.steps["step"].tolist() == list(range(1, 21))
    assert run.evals["step"].tolist() == [5, 10, 15, 20]
    assert sorted(run.domains) == ["code", "math", "prose"]
    assert run.tau == 100.0
    assert run.load is not None
    assert run.load.steps.tolist() == [10, 20]
    assert run.load.ratio.shape == (2, 2, 8)
    assert run.load.first_layer == 1
    np.testing.assert_allclose(run.load.ratio.mean(axis=-1), 1.0)
    assert run.summary is not None
    assert run.config_text.startswith("model:")


def test_heads_are_the_exact_ones_of_evaluations_where_there_are_any(make_run: MakeRun) -> None:
    """Upper bounds, ln(tokens) too high in a small run, drawn as if they were maxima."""
    heads = read_run(make_run("a", steps=20, evaluate_every=5)).heads
    assert heads is not None
    assert (heads.steps.tolist(), heads.logits.shape, heads.exact) == (FIVES, (4, 4, 4), True)
    heads = read_run(make_run("b", steps=20, evaluate_every=0)).heads
    assert heads is not None
    assert (heads.steps.tolist(), heads.exact) == ([10, 20], False)


def test_a_killed_run_is_read_as_far_as_it_came(make_run: MakeRun) -> None:
    run_dir = make_run(steps=12, evaluate_every=0, layers_every=0, finished=False)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    run = read_run(run_dir)
    assert run.steps.rows == 12
    assert run.evals.rows == 0
    assert run.heads is None
    assert run.load is None
    assert run.summary is None


def test_a_summary_older_than_the_rows_is_not_believed(make_run: MakeRun) -> None:
    """A run that was extended and killed, reported as finished with its old loss."""
    run_dir = make_run(steps=12)
    sink = JsonlSink(run_dir)
    sink.row("step", {"step": 13, "tokens": 13 * 8192, "loss": 1.0})
    sink.close()
    assert read_run(run_dir).summary is None


def test_a_missing_key_or_null_is_nan_not_a_crash(make_run: MakeRun) -> None:
    run_dir = make_run(steps=2)
    sink = JsonlSink(run_dir)
    sink.row("step", {"step": 3, "mfu": None})
    sink.close()
    run = read_run(run_dir)
    assert np.isnan(run.steps["mfu"]).tolist() == [False, False, True]
    assert np.isnan(run.steps["no_such_key"]).all()
    assert not run.steps.has("no_such_key")


def test_long_runs_are_thinned_with_both_ends_kept(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "LAYER_ROWS", 5)
    run = read_run(make_run(steps=40, layers_every=2, experts=4))
    assert run.load is not None
    assert len(run.load.steps) == 5
    assert run.load.steps[[0, -1]].tolist() == [2, 40]


def test_an_expert_that_gets_nothing_has_load_zero_and_an_idle_layer_is_even(
    make_run: MakeRun,
) -> None:
    run_dir = make_run(steps=1, layers_every=0)
    sink = JsonlSink(run_dir)
    load = [[1.0, 0.0], [0.0, 0.0]]
    sink.row("layers", {"step": 1, "max_logits": [[1.0]], "clipped": [[0]], "expert_load": load})
    sink.close()
    recorded_load = read_run(run_dir).load
    assert recorded_load is not None
    assert recorded_load.ratio.tolist() == [[[2.0, 0.0], [1.0, 1.0]]]


@pytest.mark.parametrize("missing", ["directory", "config.yaml", "metrics.jsonl", "rows"])
def test_what_is_no_run_is_one_line(make_run: MakeRun, missing: str) -> None:
    """A traceback for a mistyped path."""
    run_dir = make_run(steps=1)
    if missing == "directory":
        run_dir = run_dir / "mistyped"
    elif missing == "rows":
        (run_dir / "metrics.jsonl").write_text('{"step": 1, "lo')
    else:
        (run_dir / missing).unlink()
    with pytest.raises(ConfigError) as caught:
        read_run(run_dir)
    assert str(run_dir) in str(caught.value)
    assert "\n" not in str(caught.value)
