"""What the training loop reads: batches by sample number, held-out windows, prefetching.

Sample i of a run is a pure function of (seed, mixture, i): ``Mixture`` names its domain and
how many samples of it came before, ``in_epochs`` the window, ``Windows`` the tokens. There
is no reader state. Any rank asks for any range and gets the same samples, so a run resumes
from one integer and its global batches are the same on every layout.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import DataConfig, MixtureStageConfig
from kimi_pretrain.data.assembly import IGNORED, Batch, Plan, assemble, plan
from kimi_pretrain.data.indexed import IndexedReader
from kimi_pretrain.data.mixture import Mixture
from kimi_pretrain.data.prepared import PreparedData
from kimi_pretrain.data.windows import Windows, in_epochs

__all__ = [
    "IGNORED",
    "Batch",
    "HeldoutStream",
    "Prefetcher",
    "Stream",
    "TrainStream",
    "heldout_windows",
]

# Samples looked up at a time by who reads one batch after the other: the cost of a look-up
# is that of its numpy calls, the same for 8 samples as for a thousand.
AHEAD = 2048


class Stream(Protocol):
    """Anything that gives samples by number."""

    def read(self, first_sample: int, count: int) -> Batch:
        """Samples [first_sample, first_sample + count)."""
        ...


class TrainStream:
    """The samples of a run by number.

    Without `data.mixture` each domain is weighted by its size, so that all end an epoch
    together (to 1/65,536 where there are more windows). Raises ConfigError if a file or the
    mixture cannot be used. `samples` is the number of samples the mixture allows, None if it
    is open.
    """

    def __init__(self, prepared: PreparedData, config: DataConfig, seed: int) -> None:
        self.seed = seed
        self.sequence_length = config.sequence_length
        self.document_mask = config.document_mask
        # Sorted: the order in which a configuration lists its domains decides nothing.
        prefixes = {name: files.train for name, files in sorted(prepared.domains.items())}
        self.windows = _open(prefixes, config.sequence_length)
        stages = config.mixture or [
            MixtureStageConfig({name: float(w.count) for name, w in self.windows.items()})
        ]
        self.mixture = Mixture(tuple(self.windows), stages, config.sequence_length)
        self.samples = self.mixture.samples
        # Only to save work: what was looked up last, from its first sample on, and how far
        # was read. One attribute each, so that threads see a whole one.
        nothing = np.empty(0, np.int64)
        self._known = 0, plan([], nothing, nothing, self.document_mask)
        self._read_to = 0

    def read(self, first_sample: int, count: int) -> Batch:
        """Samples [first_sample, first_sample + count) of the run."""
        last_sample = first_sample + count
        start, known = self._known
        if first_sample < start or last_sample > start + len(known):
            follows = first_sample == self._read_to
            start, known = first_sample, self._look_up(first_sample, last_sample, follows)
            self._known = start, known
        self._read_to = last_sample
        return assemble(known, first_sample - start, last_sample - start, self.sequence_length)

    def _look_up(self, first: int, last: int, ahead: bool) -> Plan:
        if ahead:
            end = max(last, first + AHEAD)
            last = end if self.samples is None else max(last, min(end, self.samples))
        files = list(self.windows.items())
        domain, ordinal = self.mixture.locate(np.arange(first, last))
        window = np.empty_like(ordinal)
        for number, (name, windows) in enumerate(files):
            here = domain == number
            if here.any():
                window[here] = in_epochs(ordinal[here], windows.count, self.seed, name)
        return plan([windows for _, windows in files], domain, window, self.document_mask)

    def epochs(self, sample: int) -> dict[str, float]:
        """How often each domain was read after the first `sample` samples, 1.0 = once."""
        counts = self.mixture.counts(sample).tolist()
        return {
            name: count / windows.count
            for (name, windows), count in zip(self.windows.items(), counts, strict=True)
        }


class HeldoutStream:
    """The held-out windows of each domain that has them, in one order for every run.

    The order is a permutation that depends on no seed: the first k windows are a fair sample
    of the domain, the same at every evaluation and in every run on this data.
    """

    def __init__(self, prepared: PreparedData, config: DataConfig) -> None:
        self.document_mask = config.document_mask
        self.sequence_length = config.sequence_length
        prefixes = {n: f.heldout for n, f in prepared.domains.items() if f.heldout is not None}
        self.windows = _open(prefixes, config.sequence_length)

    def shares(self, count: int) -> dict[str, int]:
        """How many of `count` windows each domain gives: even, as far as its windows reach."""
        result = dict.fromkeys(self.windows, 0)
        # Smallest domain first: what it cannot give is spread over the others.
        for left, name in enumerate(sorted(result, key=lambda n: self.windows[n].count)):
            even = -(-(count - sum(result.values())) // (len(result) - left))
            result[name] = min(even, self.windows[name].count)
        return result

    def read(self, domain: str, first: int, count: int) -> Batch:
        """Windows [first, first + count) of a domain in held-out order."""
        windows = self.windows[domain]
        chosen = in_epochs(np.arange(first, first + count), windows.count, "heldout", domain)
        found = plan([windows], np.zeros(count, np.int64), chosen, self.document_mask)
        return assemble(found, 0, count, self.sequence_length)


def heldout_windows(
    prepared: PreparedData, config: DataConfig, count: int, batch_size: int
) -> Iterator[tuple[str, Batch]]:
    """About `count` held-out windows, evenly from each domain, as (domain, Batch) pairs.

    Batches hold at most `batch_size` samples and never mix domains, so that a loss a domain
    needs no second pass. The same windows come at every call.
    """
    stream = HeldoutStream(prepared, config)
    for domain, windows in stream.shares(count).items():
        for first in range(0, windows, batch_size):
            yield domain, stream.read(domain, first, min(batch_size, windows - first))


class Prefetcher:
    """Batches read ahead by one thread: samples first, first + stride, ... of a stream.

    `stride` is the distance between two batches' first samples; a data-parallel rank that
    reads its part of each global batch sets it to the global batch size. At most `depth`
    batches wait. Iterating raises what reading raised, at the batch that failed, and ends
    there. `close` waits for the thread; use the prefetcher as a context manager.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        first_sample: int,
        stride: int | None = None,
        depth: int = 2,
    ) -> None:
        self._stream = stream
        self._size = batch_size
        self._next = first_sample
        self._stride = batch_size if stride is None else stride
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Batch]] = deque()
        for _ in range(depth):
            self._ask()

    def _ask(self) -> None:
        self._ahead.append(self._thread.submit(self._stream.read, self._next, self._size))
        self._next += self._stride

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft()
        if batch.exception() is not None:
            self.close()
        else:
            self._ask()
        return batch.result()

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; calling it again does nothing."""
        self._ahead.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _open(prefixes: Mapping[str, Path], length: int) -> dict[str, Windows]:
    opened = {}
    for name, prefix in prefixes.items():
        windows = Windows(IndexedReader(prefix), length)
        if not windows.count:
            raise ConfigError(
                f"domain {name}",
                f"{windows.reader.total_tokens} tokens in {prefix}",
                f"one window takes sequence_length + 1 = {length + 1}",
                "a smaller data.sequence_length, or more text",
            )
        opened[name] = windows
    return opened
