"""What `kimi-pretrain top` shows, of runs that tests make up."""

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry.breakdown import PARTS, Seat, comparison
from kimi_pretrain.telemetry.goodput import launched
from kimi_pretrain.telemetry.jsonl import JsonlSink, newest_rows
from kimi_pretrain.telemetry.nvml import READINGS, device_comparison
from kimi_pretrain.telemetry.top import frame, main
from kimi_pretrain.telemetry.watched import look

MakeRun = Callable[..., Path]


def shown(run_dir: Path, width: int = 100, later: float = 0.0) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    console.print(frame(look(run_dir, time.time() + later)))
    return out.getvalue()


def with_ranks(run_dir: Path, ratio: float = 1.0, reasons: int = 0, host: str = "b") -> Path:
    """Adds the parts of one more step, and four ranks of which rank 2 may be slow and hot."""
    seats = [Seat(name, 0) for name in ("a", "a", host, host)]
    quick = dict.fromkeys(PARTS, 0.0) | {"compute": 1.0, "ep": 0.5}
    ranks = [quick, quick, quick | {"compute": ratio, "ep": 0.25}, quick]
    reading = dict.fromkeys(READINGS, math.nan) | {"failed": 0.0}
    cool = reading | {"temperature_celsius": 61.0, "throttle_reasons": 0.0}
    hot = cool | {"throttle_reasons": float(reasons)}
    (last,) = newest_rows(run_dir / "metrics.jsonl", 1)
    fields = {f"{part}_seconds": quick[part] for part in PARTS}
    step = last | fields | {"step": last["step"] + 1, "step_seconds": 1.5, "goodput": 0.87}
    sink = JsonlSink(run_dir)
    sink.row("step", step)
    readings = device_comparison([cool, cool, hot, cool], seats)
    sink.row("ranks", {"step": step["step"], "steps": 1, **comparison(ranks, seats), **readings})
    sink.close()
    launched(run_dir, 0.0, ranks=4, first_step=0, total_steps=500)
    return run_dir


def test_a_run_that_trains(make_run: MakeRun) -> None:
    """Catches a figure without its row, and a share of something else than the step."""
    text = shown(with_ranks(make_run(finished=False)))
    assert text.startswith("running  k2_nano, 4 ranks, 1 start  ")
    assert "401/500" in text
    assert "goodput 87%" in text
    assert [line.split() for line in text.splitlines() if line.startswith("exposed ep")] == [
        ["exposed", "ep", "0.5000", "33%", "0.2500", "0.5000", "0.5000"]
    ]
    assert "GPU temperature" in text
    assert "x what its stage" not in text


def test_the_bad_node_is_the_first_thing_seen(make_run: MakeRun) -> None:
    """Catches an alarm below the tables, or one without its host."""
    run = with_ranks(make_run(finished=False), ratio=1.5, reasons=0x40, host="node-17")
    lines = shown(run, width=300).splitlines()
    assert lines[1] == "GPU of rank 2 on node-17: hardware thermal slowdown"
    assert lines[2].startswith("rank 2 on node-17 takes 1.50 x what its stage's median does")
    assert "most in compute" in lines[2]


def test_a_run_that_hangs_is_told_and_one_that_evaluates_is_not(make_run: MakeRun) -> None:
    """Catches a hang that looks like a running step, and an alarm at every checkpoint."""
    run = with_ranks(make_run(finished=False))
    assert "running" in shown(run, later=30)
    text = shown(run, later=600)
    assert "late" in text
    assert "no step for 10:00" in text


def test_a_run_that_has_ended_is_not_late(make_run: MakeRun) -> None:
    """Catches last month's run told as hanging."""
    text = shown(make_run(), later=1e6)
    assert "ended" in text
    assert "no step for" not in text


def test_before_the_first_step(make_run: MakeRun) -> None:
    """Catches a watcher that must be started after the run."""
    assert "before its first step" in shown(make_run(steps=0, finished=False))


def test_a_row_that_is_being_written_is_left_for_the_next_frame(make_run: MakeRun) -> None:
    """Catches a frame that fails on the first half of a row."""
    run = make_run(steps=5, finished=False)
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    assert "5/5" in shown(run)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_the_newest_rows_of_a_long_file(tmp_path: Path, count: int) -> None:
    """Catches a row cut at a block's edge, and one row too few."""
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "text": "x" * 700} for step in range(1, 501)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert newest_rows(path, count) == rows[-count:]


def test_a_file_without_a_whole_row_has_none(tmp_path: Path) -> None:
    """Catches a loop that never finds the start of a short file."""
    path = tmp_path / "rows.jsonl"
    assert newest_rows(path, 3) == []
    path.write_text('{"step"')
    assert newest_rows(path, 3) == []


def test_a_host_s_name_cannot_write_to_the_terminal(make_run: MakeRun) -> None:
    """Catches an escape sequence in a file of the run that reaches the terminal."""
    run = with_ranks(make_run(finished=False), ratio=2.0, host="\x1b[2Jnode")
    assert "\x1b[2J" not in shown(run)


def test_once_prints_one_frame(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that never ends where its output is a file."""
    assert main([str(make_run(finished=False)), "--once"]) == 0
    assert "running" in capsys.readouterr().out


def test_it_goes_on_with_the_run_and_ends_with_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a picture that stands still, and a watcher that outlives what it watches."""
    run = make_run(steps=3, finished=False)
    out = io.StringIO()
    monkeypatch.setattr(
        "kimi_pretrain.telemetry.top.Console",
        lambda **options: Console(file=out, force_terminal=True, width=100),
    )
    finish: list[Any] = [lambda: None, lambda: make_run(steps=4), lambda: pytest.fail("goes on")]
    monkeypatch.setattr("kimi_pretrain.telemetry.top.time.sleep", lambda _: finish.pop(0)())
    assert main([str(run)]) == 0
    assert "ended" in out.getvalue()


@pytest.mark.parametrize("flags", [["--interval", "0"], ["--interval", "soon"], ["--often"]])
def test_flags_are_refused_in_one_line(make_run: MakeRun, flags: list[str]) -> None:
    """Catches argparse's page of usage, and a loop without a pause."""
    with pytest.raises(ConfigError, match="try "):
        main([str(make_run(steps=1)), *flags])


def test_another_directory_is_refused(tmp_path: Path) -> None:
    """Catches an empty frame for a mistyped path."""
    with pytest.raises(ConfigError, match=r"holds config\.yaml"):
        main([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
