"""Runs a schedule: one rank's actions, in order, on the phases of its chunks (design 4.2, 4.3).

- ``F``, ``I`` and ``B`` drive a chunk's generators (``model.tape``) straight through; an
  ``Overlap`` alternates two of them, one step each, so that while one computes the other's
  all-to-all flies. Per layer, f one microbatch forwards and b another backwards, communication
  in brackets: ``[b.combine] | f.attend`` -> ``[f.dispatch] | b.expert`` -> ``[b.dispatch] |
  f.expert`` -> ``[f.combine] | b.attend``.
- Weight gradients wait in a queue that the executor owns, by stage and microbatch: ``W``
  computes them. Of a whole backward (``B``) each layer's are computed while its rows fly, and
  the last layer's are held back until the gradient has been sent to the previous stage.
- What a microbatch keeps leaves the device at an ``OFFLOAD``, is freed once the next computation
  has been given, and comes back at its ``PREFETCH``; a ``RECOMPUTE`` computes again ahead of the
  backward what that would compute again.
- A ``PeerError`` tells which action the rank was in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.activation.offload import Offloader
from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.model.microbatch import DeviceBatch, Microbatch
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.tape import ChunkTape, Steps, backward_steps, forward_steps
from kimi_pretrain.ops.attention import several_documents
from kimi_pretrain.ops.main_grad import Deferral, Product
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import Dispatcher, Flight
from kimi_pretrain.parallel.errors import PeerError, during
from kimi_pretrain.pipeline.actions import COMPUTE, Action, Kind, Node, Overlap, Schedule
from kimi_pretrain.pipeline.mailbox import Key, Mailbox
from kimi_pretrain.pipeline.timeline import ALL_TO_ALL, COPY, P2P
from kimi_pretrain.pipeline.watch import Observe, Watch
from kimi_pretrain.pipeline.weigh import weighed

Products = list[Product]  # matrix products that add weight gradients
Waiting = list[tuple[str, Products]]  # those of one backward, by the phase that put them off


@dataclass
class Work:
    """One step's part of this rank."""

    microbatches: Sequence[DeviceBatch]  # this replica's, the same on every stage
    record: StepRecord
    denominator: int  # labels of the global batch
    # called after this rank's last forward, with the sum of its losses
    forwards_done: Callable[[Tensor], None]


class Executor:
    """Walks one rank's row of a schedule, a step at a time."""

    def __init__(
        self,
        schedule: Schedule,
        model: RankModel,
        dispatcher: Dispatcher,
        group: Group,
        observe: Observe | None = None,
        activations: Activations | None = None,
    ) -> None:
        """An executor.

        Args:
            schedule: verified, with sends and receives.
            model: the chunks of the stages that the schedule places on this rank.
            dispatcher: to the experts.
            group: the ranks of this pipeline, in order.
            observe: is told when what was computed and what flew; may change between steps.
            activations: how what backward needs is kept; None: as it is.
        """
        self.schedule, self.model, self.dispatcher, self.group = schedule, model, dispatcher, group
        self.observe = observe
        self.activations = Activations.kept() if activations is None else activations
        # told, after every segment, of the bytes on the device that backwards wait for, by tag
        self.weigh: Callable[[Mapping[str, int]], None] | None = None
        self.weigh_now: Callable[[], None] = _nothing  # tells it now, within a step
        self.deferral = Deferral()
        for _, parameter in model.named_parameters():
            parameter.main_grad_deferral = self.deferral  # type: ignore[attr-defined]

    def run(self, work: Work) -> None:
        """Every forward and backward of a step.

        Raises:
            PeerError: another rank failed or did not answer in time; says in which action.
        """
        step = _Step(self, work)
        self.weigh_now = step.weigh
        try:
            self._run(step)
        finally:
            self.weigh_now = _nothing  # or the step would live on

    def _run(self, step: "_Step") -> None:
        for position, node in enumerate(self.schedule.ranks[self.group.index]):
            try:
                step.do(node)
            except PeerError as error:
                where = f"rank {self.group.ranks[self.group.index]} was in {node}"
                raise PeerError(f"{error} ({where}, action {position} of the step)") from error
        with during("awaiting the last messages of the step's actions"):
            step.close()


@dataclass
class _Strand:
    """One microbatch on its way through a chunk."""

    action: Action
    steps: Steps
    flight: Flight[Any] | None = None  # what is to arrive before it goes on

    @property
    def backward(self) -> bool:
        return self.action.kind is not Kind.F


@dataclass
class _Step:
    """What lives as long as one step."""

    executor: Executor
    work: Work
    tapes: dict[tuple[int, int], ChunkTape] = field(default_factory=dict)
    queued: dict[tuple[int, int], Waiting] = field(default_factory=dict)
    # the last layer's of a whole backward, and the node it was in
    held: tuple[str, Action, Waiting] | None = None
    putting_off: Waiting = field(default_factory=list)  # those of the backward that is computed

    def __post_init__(self) -> None:
        self.schedule, self.model = self.executor.schedule, self.executor.model
        self.dispatcher, self.deferral = self.executor.dispatcher, self.executor.deferral
        self.offloader = self.executor.activations.offloader
        batches, width = self.work.microbatches, self.model.config.hidden_size
        shapes = [(*batch.tokens.shape, width) for batch in batches]
        self.mail = Mailbox(self.executor.group, shapes, self.model.dtype, self.schedule.stages)
        self.watch = Watch(self.executor.observe)
        self.positions: dict[int, Microbatch] = {}  # by length: tables are large
        self.shared: dict[int, Microbatch] = {}
        self.loss = torch.zeros(
            (), dtype=self.work.record.max_logits.dtype, device=self.model.device
        )
        mine = [s for s in self.model.chunks if self.schedule.placement[s] == self.mail.group.index]
        self.forwards_left = len(mine) * self.schedule.microbatches

    def do(self, node: Node) -> None:
        computes = isinstance(node, Overlap) or node.kind in COMPUTE
        if computes:
            self._compute_held()
        self.watch.node = str(node)
        leaving = 0 if self.offloader is None else self.offloader.mark()
        if isinstance(node, Overlap):
            self._overlap(node.forward, node.backward)
        else:
            _DO[node.kind](self, node)
        self.weigh()
        if computes and self.offloader is not None:
            self.offloader.settle(leaving)

    def close(self) -> None:
        """The step is over.

        Raises:
            RuntimeError: a weight gradient or a tensor between stages is left.
        """
        self._compute_held()
        self.mail.close()
        self.watch.look()
        if self.queued or self.tapes:
            raise RuntimeError(f"left over: weights {[*self.queued]}, tapes {[*self.tapes]}")

    # --- the actions ----------------------------------------------------------------------

    def forward(self, action: Action) -> None:
        self._drive([_Strand(action, self._forward(action))])

    def backward_input(self, action: Action) -> None:
        waiting = self.queued.setdefault((action.stage, action.microbatch), [])
        self._drive([_Strand(action, self._backward(action))], waiting)

    def backward(self, action: Action) -> None:
        waiting: Waiting = []
        self._drive([_Strand(action, self._backward(action))], waiting, at_once=True)
        self.held = self.watch.node, action, waiting

    def weights(self, action: Action) -> None:
        started = perf_counter()
        for _, products in self.queued.pop((action.stage, action.microbatch)):
            _compute(products)
        self.watch.computed(action, "weight", started)

    def offload(self, action: Action) -> None:
        started = perf_counter()
        ticket = self._moving.leave(self._saved(action).offloadable())
        if ticket is not None:
            self.watch.flies(COPY, action, "", started, ticket)

    def prefetch(self, action: Action) -> None:
        started = perf_counter()
        ticket = self._moving.fetch(self._saved(action).offloadable())
        if ticket is not None:
            self.watch.flies(COPY, action, "", started, ticket)

    def recompute(self, action: Action) -> None:
        started = perf_counter()
        self._saved(action).recompute()
        self.watch.computed(action, "again", started)

    def _saved(self, action: Action) -> Saved:
        return self.tapes[action.stage, action.microbatch].saved

    @property
    def _moving(self) -> Offloader:
        assert self.offloader is not None, "a schedule that moves activations needs a policy"
        return self.offloader

    def send_activation(self, action: Action) -> None:
        self._send(action, "activation", action.stage + 1)

    def receive_activation(self, action: Action) -> None:
        self._receive(action, "activation", action.stage - 1)

    def send_gradient(self, action: Action) -> None:
        self._send(action, "gradient", action.stage - 1)

    def receive_gradient(self, action: Action) -> None:
        self._receive(action, "gradient", action.stage + 1)

    def _overlap(self, f: Action, b: Action) -> None:
        whole = b.kind is Kind.B
        waiting = [] if whole else self.queued.setdefault((b.stage, b.microbatch), [])
        pair = [_Strand(b, self._backward(b)), _Strand(f, self._forward(f))]
        self._drive(pair, waiting, at_once=whole)
        if whole:
            self.held = self.watch.node, b, waiting

    # --- messages -------------------------------------------------------------------------

    def _send(self, action: Action, what: str, to: int) -> None:
        started = perf_counter()
        leaving = self.mail.send((what, to, action.microbatch), self.schedule.placement[to])
        self.watch.flies(P2P, action, "", started, leaving)

    def _receive(self, action: Action, what: str, source: int) -> None:
        started = perf_counter()
        key = what, action.stage, action.microbatch
        coming = self.mail.post(key, self.schedule.placement[source])
        self.watch.flies(P2P, action, "", started, coming)

    def _take(self, key: Key) -> Tensor:
        tensor = self.mail.take(key)
        self.watch.look()
        return tensor

    # --- driving generators ---------------------------------------------------------------

    def _drive(
        self, strands: list[_Strand], waiting: Waiting | None = None, at_once: bool = False
    ) -> None:
        """Resume each in turn until all have ended.

        ``waiting`` takes the weight gradients that a backward puts off; ``at_once`` computes
        them as soon as rows are flying, but for those of the last phases.
        """
        self.putting_off = [] if waiting is None else waiting
        while strands:
            for strand in list(strands):
                goes_on = self._go_on(strand, waiting if strand.backward else None)
                self.weigh()
                if not goes_on:
                    strands.remove(strand)
                elif at_once and strand.backward and waiting:
                    self._compute_waiting(strand.action, waiting)
        self.putting_off = []  # whoever has them now lets them go

    def _go_on(self, strand: _Strand, waiting: Waiting | None) -> bool:
        """Compute until rows fly again; False once it has ended."""
        if strand.flight is not None:
            strand.flight.arrive()
            self.watch.look()
        while True:
            products: Products | None = None if waiting is None else []
            self.deferral.into = products
            started = perf_counter()
            try:
                phase, strand.flight = next(strand.steps)
            except StopIteration as end:
                self._finish(strand.action, end.value)
                return False
            finally:
                self.deferral.into = None
            if strand.flight is not None:
                if strand.flight.flies:
                    self.watch.flies(ALL_TO_ALL, strand.action, phase, started, strand.flight)
                return True
            self.watch.computed(strand.action, phase, started)
            if waiting is not None and products:
                waiting.append((phase, products))

    def weigh(self) -> None:
        """Tell whoever asked what lies on the device for backwards now."""
        if self.executor.weigh is not None:
            late = [] if self.held is None else self.held[2]
            queues = [*self.queued.values(), self.putting_off, late]
            products = [product for queue in queues for _, part in queue for product in part]
            products += self.deferral.into or []
            self.executor.weigh(weighed(self.executor.activations, products))

    def _compute_held(self) -> None:
        if self.held is not None:
            (self.watch.node, action, waiting), self.held = self.held, None
            self._compute_waiting(action, waiting)

    def _compute_waiting(self, action: Action, waiting: Waiting) -> None:
        for phase, products in waiting:
            started = perf_counter()
            _compute(products)
            self.watch.computed(action, f"{phase}.W", started)
        waiting.clear()

    def _forward(self, action: Action) -> Steps:
        stage, number = action.stage, action.microbatch
        batch = self.work.microbatches[number]
        x = batch.tokens if stage == 0 else self._take(("activation", stage, number))
        chunk = self.model.chunks[stage]
        loss = None
        if stage == self.schedule.stages - 1:
            self.work.record.tokens += batch.tokens.numel()

            def loss(hidden: Tensor) -> Tensor:
                result: Tensor = chunk.lm_head(
                    hidden.flatten(0, 1), batch.labels.flatten(), self.work.denominator
                )
                return result

        def keep(tape: ChunkTape) -> None:
            self.tapes[stage, number] = tape

        shared, activations = self._microbatch(number), self.executor.activations
        return forward_steps(chunk, x, shared, self.dispatcher, keep, loss, activations)

    def _backward(self, action: Action) -> Steps:
        stage, number = action.stage, action.microbatch
        if stage == self.schedule.stages - 1:
            grad = torch.ones_like(self.loss)
        else:
            grad = self._take(("gradient", stage, number))
        return backward_steps(self.tapes.pop((stage, number)), grad, self.dispatcher)

    def _finish(self, action: Action, result: Tensor) -> None:
        """Put a compute action's result where it is wanted next."""
        stage, number = action.stage, action.microbatch
        if action.kind is not Kind.F:
            if stage > 0:
                self.mail.put(("gradient", stage - 1, number), result)
            return
        if stage == self.schedule.stages - 1:
            self.loss += result
        else:
            self.mail.put(("activation", stage + 1, number), result)
        self.forwards_left -= 1
        if self.forwards_left == 0:
            self.work.forwards_done(self.loss)

    def _microbatch(self, number: int) -> Microbatch:
        """Positions and documents of a microbatch, the same for every stage of this rank."""
        if number not in self.shared:
            batch = self.work.microbatches[number]
            length = batch.tokens.shape[1]
            if length not in self.positions:
                self.positions[length] = Microbatch.build(
                    self.model.config,
                    length,
                    self.model.dtype,
                    batch.tokens.device,
                    record=self.work.record,
                )
            documents = several_documents(batch.document_ids)
            self.shared[number] = replace(self.positions[length], document_ids=documents)
        return self.shared[number]


def _nothing() -> None:
    """No step is running."""


@torch.no_grad()  # else a main gradient would become part of the forward's graph
def _compute(products: Products) -> None:
    for product in products:
        product.add()


_DO: Mapping[Kind, Callable[[_Step, Action], None]] = {
    Kind.F: _Step.forward,
    Kind.I: _Step.backward_input,
    Kind.B: _Step.backward,
    Kind.W: _Step.weights,
    Kind.SEND_F: _Step.send_activation,
    Kind.RECV_F: _Step.receive_activation,
    Kind.SEND_B: _Step.send_gradient,
    Kind.RECV_B: _Step.receive_gradient,
    Kind.OFFLOAD: _Step.offload,
    Kind.PREFETCH: _Step.prefetch,
    Kind.RECOMPUTE: _Step.recompute,
}
