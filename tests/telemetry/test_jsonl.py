import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.telemetry.jsonl import TIMING_FIELDS, JsonlSink, read_rows, truncate_after


def record(run_dir: Path, steps: range, *, seconds: float = 0.5) -> None:
    """What a run writes for these steps: an evaluation every 4, layers every 2."""
    sink = JsonlSink(run_dir)
    for step in steps:
        row = {"step": step, "tokens": 64 * step, "loss": math.exp(-step), "step_seconds": seconds}
        sink.row("step", row)
        if step % 2 == 0:
            sink.row("layers", {"step": step, "max_logits": [[1.0 / step]]})
        if step % 4 == 0:
            sink.row("eval", {"step": step, "heldout_loss": 1.0 / step})
    sink.close()


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-310, math.pi * 1e200, -0.0, float(np.float32(0.1))]
    sink = JsonlSink(tmp_path)
    sink.row("step", {"step": 1, "values": values})
    sink.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert [v.hex() for v in row["values"]] == [v.hex() for v in values]


def test_nan_and_infinity_stay_numbers_for_json_loads(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.row("step", {"step": 1, "loss": math.nan, "max_logit": -math.inf, "grad_norm": math.inf})
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert math.isnan(row["loss"])
    assert row["max_logit"] == -math.inf
    assert row["grad_norm"] == math.inf


def test_arrays_and_array_scalars_are_written_as_lists_and_numbers(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.row("layers", {"step": np.int64(2), "max_logits": np.ones((1, 2)), "clipped": [[True]]})
    with pytest.raises(TypeError, match="a row holds"):
        sink.row("layers", {"step": 4, "path": tmp_path})
    sink.close()
    rows = list(read_rows(tmp_path / "layers.jsonl"))
    assert rows == [{"step": 2, "max_logits": [[1.0, 1.0]], "clipped": [[True]]}]


def test_every_row_is_readable_before_the_sink_is_closed(tmp_path: Path) -> None:
    """A row that waits in a buffer is lost by kill -9 and invisible to who watches."""
    sink = JsonlSink(tmp_path)
    for step in (1, 2):
        sink.row("step", {"step": step})
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")][-1] == step
    sink.close()


def test_a_sink_without_rows_makes_no_empty_files(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "run").close()
    assert list((tmp_path / "run").iterdir()) == []


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        JsonlSink(tmp_path).row("steps", {"step": 1})


def test_an_interrupted_run_records_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Duplicated, missing or reordered rows after a resume from an older checkpoint."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    record(whole, range(1, 13), seconds=0.5)
    record(resumed, range(1, 10), seconds=0.7)
    truncate_after(resumed, 6)
    record(resumed, range(7, 13), seconds=0.9)
    for name in ("metrics.jsonl", "evals.jsonl", "layers.jsonl"):
        expected, found = (
            [
                {key: value for key, value in row.items() if key not in TIMING_FIELDS}
                for row in read_rows(run / name)
            ]
            for run in (whole, resumed)
        )
        assert found == expected, name


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 0.5}'])
def test_a_torn_last_line_is_neither_read_nor_continued(tmp_path: Path, torn: str) -> None:
    record(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    record(tmp_path, range(3, 4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("step", [0, 1, 5, 9, 20])
def test_truncation_keeps_the_bytes_of_what_it_keeps(tmp_path: Path, step: int) -> None:
    record(tmp_path, range(1, 10))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    truncate_after(tmp_path, step)
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after == b"".join(before.splitlines(True)[:step])
    assert all(row["step"] <= step for row in read_rows(tmp_path / "layers.jsonl"))


def test_truncation_of_an_empty_directory_does_nothing(tmp_path: Path) -> None:
    truncate_after(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_of_a_run_that_goes_on_is_forgotten(tmp_path: Path) -> None:
    """A report would call a killed run finished by the summary of an earlier end."""
    record(tmp_path, range(1, 9))
    sink = JsonlSink(tmp_path)
    sink.row("summary", {"tokens": 64 * 8, "heldout_loss": 2.0})
    sink.close()
    truncate_after(tmp_path, 8)
    assert (tmp_path / "summary.json").exists()
    truncate_after(tmp_path, 4)
    assert not (tmp_path / "summary.json").exists()


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:5]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2"):
        list(read_rows(path))


def test_kill_minus_9_leaves_whole_rows(tmp_path: Path) -> None:
    """Rows in a buffer, or a file that the next start cannot continue."""
    program = """
        import sys
        from pathlib import Path
        from kimi_pretrain.telemetry.jsonl import JsonlSink
        sink = JsonlSink(Path(sys.argv[1]))
        for step in range(10**9):
            sink.row("step", {"step": step, "tokens": step, "loss": 1 / 3})
            if step == 1000:
                print("going", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    truncate_after(tmp_path, 900)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(901))
