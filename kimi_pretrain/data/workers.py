"""Units of input encoded by several processes, each with the tokenizer loaded once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data.documents import Unit
from kimi_pretrain.data.parts import Outcome, encode_unit
from kimi_pretrain.data.tokenizer_protocol import Tokenizer
from kimi_pretrain.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Job:
    """One unit, and where its part goes."""

    unit: Unit
    path: Path
    dedup: str
    skip_bad_input: bool

    def run(self, tokenizer: Tokenizer) -> Outcome:
        """Encode the unit in this process."""
        return encode_unit(self.unit, tokenizer, self.dedup, self.skip_bad_input, self.path)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def run_jobs(
    jobs: Sequence[Job], tokenizer: TokenizerConfig, workers: int
) -> Iterator[tuple[Job, Outcome]]:
    """Run jobs in ``workers`` processes, or in this one if that is 1; results as they finish.

    ``tokenizer.path`` is absolute. Raises ConfigError if a worker dies; the parts that are
    finished stay.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        loaded = load_tokenizer(tokenizer, Path())
        for job in jobs:
            yield job, job.run(loaded)
        return
    # spawn: a fork would copy the thread pools of the tokenizers library in any state.
    context = multiprocessing.get_context("spawn")
    waiting = iter(jobs)
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
        running: dict[Future[Outcome], Job] = {}
        try:
            while True:
                for job in islice(waiting, 4 * workers - len(running)):
                    running[pool.submit(_work, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "worker process",
                f"{workers} workers",
                "one ended at once, for lack of memory most likely; finished parts are kept",
                f"the same command again with --workers {max(1, workers // 2)}",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


# Set once in each worker process.
_tokenizer: Tokenizer | None = None


def _start_worker(cfg: TokenizerConfig) -> None:
    global _tokenizer
    # Ctrl-C ends a worker at once and without a traceback; parts appear only when complete.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Each process keeps to its core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(cfg, Path())


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> Outcome:
    if _tokenizer is None:
        raise RuntimeError("a worker encodes after _start_worker only")
    return job.run(_tokenizer)
