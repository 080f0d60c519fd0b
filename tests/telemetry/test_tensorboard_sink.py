import socket
from pathlib import Path

import pytest

from kimi_pretrain.telemetry.tensorboard_sink import TensorboardSink

pytest.importorskip("tensorboard")


def curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself shows for one curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    sink = TensorboardSink(tmp_path)
    for step in (1, 2):
        sink.row("step", {"step": step, "loss": 1.0 / step})
    sink.row("summary", {"heldout_loss": 0.25})
    sink.close()
    assert curve(tmp_path, "step/loss") == [(1, 1.0), (2, 0.5)]
    assert curve(tmp_path, "summary/heldout_loss") == [(2, 0.25)]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    """A curve that jumps back: steps 3 and 4 drawn twice after a resume from step 2."""
    for steps, scale in ((range(1, 5), 1.0), (range(3, 6), 10.0)):
        sink = TensorboardSink(tmp_path)
        for step in steps:
            sink.row("step", {"step": step, "loss": scale * step})
        sink.close()
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert curve(tmp_path, "step/loss") == expected


def test_a_summary_alone_does_not_purge_the_run(tmp_path: Path) -> None:
    for rows in ([("step", {"step": 1, "loss": 1.0})], [("summary", {"heldout_loss": 2.0})]):
        sink = TensorboardSink(tmp_path)
        for kind, values in rows:
            sink.row(kind, values)
        sink.close()
    assert curve(tmp_path, "step/loss") == [(1, 1.0)]


def test_the_files_tell_no_host(tmp_path: Path) -> None:
    TensorboardSink(tmp_path).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name == "events.out.tfevents.000000"
    assert socket.gethostname().encode() not in path.read_bytes()
