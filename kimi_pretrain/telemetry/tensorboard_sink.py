"""TensorBoard event files, written without torch and without the host's name.

The usual writer puts the host name into the file name; records are framed by
TensorBoard's own ``RecordWriter`` here, so that the file can be named neutrally.
"""

import time
from pathlib import Path
from typing import Any

from kimi_pretrain.telemetry.scalars import scalars


class TensorboardSink:
    """Writes rows as scalars to ``run_dir/tensorboard``, one file a start of the run.

    A resumed run opens a later file whose first record tells TensorBoard to forget what
    the files before it say of steps from its first row on.
    """

    def __init__(self, run_dir: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        directory = run_dir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        starts = len(list(directory.glob("events.out.tfevents.*")))
        path = directory / f"events.out.tfevents.{starts:06d}"
        self._writer = RecordWriter(path.open("xb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._purged = starts == 0
        self._step = 0

    def row(self, kind: str, values: dict[str, Any]) -> None:
        # A summary has no step of its own: it stands at the last one.
        self._step = values.get("step", self._step)
        if not self._purged and "step" in values:
            self._purged = True
            start = self._session(status=self._session.START)
            self._write(self._event(wall_time=time.time(), step=self._step, session_log=start))
        curves = [
            self._summary.Value(tag=name, simple_value=number)
            for name, number in scalars(kind, values).items()
        ]
        event = self._event(
            wall_time=time.time(), step=self._step, summary=self._summary(value=curves)
        )
        self._write(event)

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()
