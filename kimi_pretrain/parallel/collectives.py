"""The collectives of the program, and the only calls to torch.distributed's.

A ``Group`` wraps one process group: it starts operations and hands out ``Handle``s, whose
``wait`` ends within the group's deadline or says which operation of which ranks did not. A
group of one rank needs no process group: the same calls copy locally, so that one process
runs the same code as thousands.

What gloo lacks or does badly is settled here, once:

- ``reduce_scatter`` is an all-to-all and a local sum in the order of ranks: half the bytes
  of gloo's own, which sends as much as an all-reduce, and the same bits on every run.
- bf16 sums lose accuracy: ``reduce_scatter`` and a summing ``all_reduce`` refuse what is
  narrower than fp32.
- fp8 tensors travel as bytes.
- uneven ``all_gather`` and the list forms fail: neither is offered.
- small operations take 1 to 11 ms, so callers pack what they can into one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_pretrain.parallel.errors import PeerError, first_line
from kimi_pretrain.parallel.stopwatch import Stopwatch

# torch 2.13 renamed them and warns of the old names at every call.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CPU = torch.device("cpu")


@dataclass
class Traffic:
    """Bytes that a rank sent to others through one group, and calls, by operation."""

    sent: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def count(self, operation: str, size: int) -> None:
        """One call that sent ``size`` bytes."""
        self.sent[operation] = self.sent.get(operation, 0) + size
        self.calls[operation] = self.calls.get(operation, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.sent.values())


class Handle:
    """An operation in flight; its tensors are to be left alone until ``wait`` returns."""

    def __init__(
        self,
        work: Any = None,
        what: str = "",
        deadline: float | None = None,
        finish: Callable[[], None] | None = None,
        timed: AbstractContextManager[None] | None = None,
    ) -> None:
        self._work, self._what, self._deadline, self._finish = work, what, deadline, finish
        self._timed = timed
        self._failure: PeerError | None = None

    @property
    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> None:
        """Return when the result is there; again and again without harm.

        Raises:
            PeerError: it did not come before the deadline, or a peer is gone; every time.
        """
        if self._failure is not None:
            raise self._failure
        work, self._work = self._work, None
        finish, self._finish = self._finish, None
        with nullcontext() if work is None or self._timed is None else self._timed:
            if work is not None:
                self._await(work)
            if finish is not None:
                finish()

    def _await(self, work: Any) -> None:
        try:
            if self._deadline is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self._deadline))
        except RuntimeError as error:
            self._failure = PeerError(f"{self._what}: {first_line(error)}")
            raise self._failure from error


class Group:
    """The ranks that one rank talks to in one role (ep, edp, dp, world)."""

    def __init__(
        self,
        kind: str,
        ranks: Sequence[int] = (0,),
        index: int = 0,
        process_group: Any = None,
        deadline: float = 600.0,
        downwards: Any = None,
        device: torch.device = CPU,
    ) -> None:
        """A group.

        Args:
            kind: its role, for messages.
            ranks: the members' global ranks, in group order.
            index: this rank's number among them.
            process_group: torch's group of these ranks; None for a group of one.
            deadline: seconds that an operation may take.
            downwards: torch's group for messages to lower members; None: the same. NCCL runs
                what two ranks send each other through one group strictly in the order in which
                each was given it: two that post a receive before they send would block.
            device: where tensors must be to travel through this group.
        """
        if len(ranks) > 1 and process_group is None:
            raise ValueError(f"{kind}: {len(ranks)} ranks need a process group")
        self.kind, self.ranks, self.index = kind, tuple(ranks), index
        self.process_group, self.deadline = process_group, deadline
        self.downwards = process_group if downwards is None else downwards
        self.device = device
        self.traffic = Traffic()
        self.stopwatch: Stopwatch | None = None  # is told of every wait

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        name: str = "all_to_all",
    ) -> Handle:
        """Part i of ``input`` to rank i, part i of ``output`` from rank i.

        Args:
            output: [rows, ...], contiguous.
            input: [rows, ...], contiguous, of the same dtype.
            output_splits: rows from each rank; None: equal parts.
            input_splits: rows to each rank; None: equal parts.
            name: under which traffic is counted and a failure told.
        """
        if self.size == 1:
            output.copy_(input)
            return Handle()
        own = input.shape[0] // self.size if input_splits is None else input_splits[self.index]
        row = input.nbytes // input.shape[0] if input.shape[0] else 0
        self.traffic.count(name, input.nbytes - own * row)
        return self._start(
            name,
            lambda: dist.all_to_all_single(
                _plain(output),
                _plain(input),
                None if output_splits is None else list(output_splits),
                None if input_splits is None else list(input_splits),
                group=self.process_group,
                async_op=True,
            ),
        )

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Handle:
        """The sum over ranks of part ``index`` of ``input``, in the order of ranks.

        Args:
            output: [n] fp32 or fp64; may be the very part of ``input`` it is the sum of.
            input: [size * n], contiguous; the other parts are left as they are.
        """
        _require_wide("reduce_scatter", input)
        if self.size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input)
            return Handle()
        self.traffic.count("reduce_scatter", input.nbytes - output.nbytes)
        if input.device.type != "cpu":
            return self._start(
                "reduce_scatter",
                lambda: _reduce_scatter(output, input, group=self.process_group, async_op=True),
            )
        arrived = torch.empty_like(input)

        def add() -> None:
            parts = arrived.view(self.size, -1)  # [ranks, n]
            output.copy_(parts[0])
            for part in parts[1:]:
                output.add_(part)

        return self._start(
            "reduce_scatter",
            lambda: dist.all_to_all_single(arrived, input, group=self.process_group, async_op=True),
            add,
        )

    def all_gather(self, output: Tensor, input: Tensor) -> Handle:
        """Every rank's ``input`` [n] one after the other into ``output`` [size * n].

        ``input`` may be the very part of ``output`` that it becomes.
        """
        if self.size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input)
            return Handle()
        self.traffic.count("all_gather", input.nbytes * (self.size - 1))
        return self._start(
            "all_gather",
            lambda: _all_gather(
                _plain(output), _plain(input), group=self.process_group, async_op=True
            ),
        )

    def all_reduce_max(self, tensor: Tensor) -> Handle:
        """The largest of all ranks, element by element, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def all_reduce_sum(self, tensor: Tensor) -> Handle:
        """The sum over all ranks, in place; integers, fp32 or fp64."""
        _require_wide("all_reduce", tensor)
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def broadcast(self, tensor: Tensor) -> Handle:
        """The first rank's tensor into everyone's."""
        if self.size == 1:
            return Handle()
        if self.index == 0:
            self.traffic.count("broadcast", tensor.nbytes)
        return self._start(
            "broadcast",
            lambda: dist.broadcast(
                _plain(tensor), self.ranks[0], group=self.process_group, async_op=True
            ),
        )

    def send(self, tensor: Tensor, to: int) -> Handle:
        """``tensor``, contiguous, to member number ``to``; matched in order of a pair's sends."""
        self.traffic.count("send", tensor.nbytes)
        return self._start(
            f"send to rank {self.ranks[to]}",
            lambda: dist.isend(_plain(tensor), self.ranks[to], group=self._way(self.index, to)),
        )

    def receive(self, tensor: Tensor, source: int) -> Handle:
        """Into ``tensor``, contiguous, what member number ``source`` sends."""
        return self._start(
            f"receive from rank {self.ranks[source]}",
            lambda: dist.irecv(
                _plain(tensor), self.ranks[source], group=self._way(source, self.index)
            ),
        )

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_reduce_sum(torch.zeros(1, device=self.device)).wait()

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, on every rank; no pickle travels."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(data)], device=self.device)
        lengths = torch.empty(self.size, dtype=length.dtype, device=self.device)
        self.all_gather(lengths, length).wait()
        longest = max(1, int(lengths.max()))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        texts = torch.empty(self.size * longest, dtype=torch.uint8, device=self.device)
        self.all_gather(texts, padded).wait()
        rows = zip(texts.view(self.size, longest), lengths.tolist(), strict=True)
        return [bytes(row[:n].tolist()).decode() for row, n in rows]

    def _way(self, sender: int, receiver: int) -> Any:
        return self.process_group if sender < receiver else self.downwards

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Handle:
        if self.size == 1:
            return Handle()
        # A ring sends every element twice to all but one of its ranks.
        self.traffic.count("all_reduce", 2 * tensor.nbytes * (self.size - 1) // self.size)
        return self._start(
            "all_reduce",
            lambda: dist.all_reduce(tensor, op=operation, group=self.process_group, async_op=True),
        )

    def _start(
        self, name: str, call: Callable[[], Any], finish: Callable[[], None] | None = None
    ) -> Handle:
        what = f"{name} over the {self.kind} group of ranks {_listed(self.ranks)}"
        try:
            work = call()
        except RuntimeError as error:  # torch.distributed.DistError is one
            raise PeerError(f"{what}: {first_line(error)}") from error
        # With a time to wait for, NCCL would hold up this thread instead of the stream; there the
        # process group's own watchdog keeps the deadline.
        deadline = self.deadline if self.device.type == "cpu" else None
        timed = None if self.stopwatch is None else self.stopwatch.waiting(self.kind)
        return Handle(work, what, deadline, finish, timed)


def _plain(tensor: Tensor) -> Tensor:
    """What every backend can carry: fp8 as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype in _FP8 else tensor


def _require_wide(operation: str, tensor: Tensor) -> None:
    if tensor.dtype in (torch.bfloat16, torch.float16, *_FP8):
        raise ValueError(f"{operation} sums in fp32 or fp64, not in {tensor.dtype}")


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
