"""Writes checkpoints behind the run's back: the loop waits for a copy, not for the disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kimi_pretrain.checkpoint.state import Snapshot, write
from kimi_pretrain.checkpoint.store import commit, prune


class CheckpointWriter:
    """One background writer; a checkpoint is begun only when the one before is on disk.

    A failed write raises at the next `save` or `close`, never silently: a run that cannot
    checkpoint must not go on for hours.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write `snapshot` as the checkpoint of `step`, then remove what is too old."""
        self.wait()
        self._pending = self._thread.submit(self._write, step, snapshot)

    def wait(self) -> None:
        """Return when the last checkpoint is on disk; raises what its writing raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, snapshot: Snapshot) -> None:
        commit(self.root, step, lambda directory: write(directory, snapshot))
        prune(self.root, self.keep, step)
