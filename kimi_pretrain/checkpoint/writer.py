"""Writes checkpoints behind the run's back: the loop waits for a copy, not for the disk."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kimi_pretrain.checkpoint.commit import commit
from kimi_pretrain.checkpoint.state import Snapshot, write
from kimi_pretrain.checkpoint.store import prune


class CheckpointWriter:
    """One background writer a rank; a checkpoint is begun only when the one before is done.

    Done means: this rank's files are on disk, and on rank 0, the checkpoint of all ranks is.
    A failed write raises at the next `save`, `wait` or `close`, never silently: a run that
    cannot checkpoint must not go on for hours.

    Args:
        root: the directory of checkpoints, shared by all ranks.
        keep: how many checkpoints stay; rank 0 removes older ones.
        rank: of this process.
        world: number of ranks.
        deadline: seconds that rank 0 waits for the other ranks' files.
    """

    def __init__(
        self, root: Path, keep: int, rank: int = 0, world: int = 1, deadline: float = 600.0
    ) -> None:
        self.root = root
        self.keep = keep
        self.rank = rank
        self.world = world
        self.deadline = deadline
        self._abandoned = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write `snapshot` into the checkpoint of `step`, then remove what is too old.

        Every rank saves the same steps, each of them once.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, step, snapshot)

    def wait(self) -> None:
        """Return when the last save is done.

        Raises:
            PeerError: on rank 0, other ranks did not write in time; names them.
            OSError: the disk refused this rank's files.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def abandon(self) -> None:
        """Stop waiting for other ranks, of which one is known to have failed; `close` follows."""
        self._abandoned.set()

    def close(self) -> None:
        """Wait and end the thread; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, snapshot: Snapshot) -> None:
        commit(
            self.root,
            step,
            lambda directory: write(directory, snapshot),
            self.rank,
            self.world,
            self.deadline,
            self._abandoned,
        )
        if self.rank == 0:
            prune(self.root, self.keep, step)
