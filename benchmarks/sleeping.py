"""Chunks whose computing is sleep, between real tensors: more ranks than cores, undistorted.

A rank that sleeps needs no core, so four ranks on two cores take the time of four machines. All
else is real: the executor, its autograd graphs, the dispatcher, every byte between ranks. Sleeps
are calibrated as they go: what one takes too long, waking up, the next is shorter.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.chunk import Chunk, Embedding
from kimi_pretrain.model.layer import Attended, Layer, Routed
from kimi_pretrain.model.microbatch import DeviceBatch, Microbatch
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.ops.main_grad import deferred
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import Arrived, Dispatcher, DispatchPlan, plan_dispatch
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.costs import Costs, Phases
from kimi_pretrain.pipeline.execute import Executor, Work

_VOCABULARY = 8


@dataclass(frozen=True)
class Seconds:
    """How long a layer computes, a microbatch: forward, input gradient, weight gradients.

    ``expert`` is None in a dense layer, which is one phase.
    """

    attend: tuple[float, float, float]
    expert: tuple[float, float, float] | None = None

    @property
    def total(self) -> float:
        return sum(self.attend) + sum(self.expert or ())

    def costs(self, layers: Sequence[int], all_to_all: float = 0.0, p2p: float = 0.0) -> Costs:
        """Of ``layers`` [stages] for the simulator, at seconds of one way of an all-to-all."""
        expert = self.expert or (0.0, 0.0, 0.0)
        forward, backward = (
            Phases(self.attend[i], all_to_all, expert[i], all_to_all) for i in (0, 1)
        )
        weight = Phases(attend=self.attend[2], expert=expert[2])
        return Costs(tuple(layers), forward, backward, weight, p2p=p2p)


class Shape(NamedTuple):
    """Of what travels: tokens and width between stages, choices a token to the experts."""

    tokens: int
    hidden: int
    choices: int = 1


def model_config(shape: Shape, layers: int) -> ModelConfig:
    """A configuration of that width, of which nothing is computed."""
    return compose(
        [
            "run_dir=unused",
            "model=k2_micro",
            f"model.hidden_size={shape.hidden}",
            f"model.num_hidden_layers={layers}",
            "model.first_k_dense_replace=0",
        ]
    ).model


class _Clock:
    """Sleeps that are right on average: by what one ends too late, the next is shorter."""

    def __init__(self) -> None:
        self.late = 0.0

    def sleep(self, seconds: float) -> None:
        if seconds <= 0.0:
            return
        started = time.perf_counter()
        time.sleep(max(0.0, seconds - self.late))
        self.late += time.perf_counter() - started - seconds


sleep = _Clock().sleep


class _Sleeps(torch.autograd.Function):
    """The identity, for a while; backward too, with a weight gradient that can be put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: tuple[float, float, float]) -> Tensor:
        ctx.weight, ctx.seconds = weight, seconds
        sleep(seconds[0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sleep(ctx.seconds[1])
        add = partial(sleep, ctx.seconds[2])
        if not deferred(ctx.weight, grads[0], add):
            add()
        return grads[0], None, None


class SleepingLayer(Layer):
    """A layer's phases and what they hand over; its experts are chosen evenly, in turn."""

    def __init__(self, index: int, shape: Shape, seconds: Seconds, plan: DispatchPlan | None):
        nn.Module.__init__(self)
        self.index, self.seconds, self.plan = index, seconds, plan
        self.weight = nn.Parameter(torch.zeros(1))
        self.factors = torch.full((shape.tokens, shape.choices), 1.0 / shape.choices)

    @property
    def router(self) -> Any:
        return self.plan  # all that is asked is whether there is one

    def attend(self, x: Tensor, microbatch: Microbatch, dispatcher: Dispatcher) -> Attended:
        hidden = _Sleeps.apply(x, self.weight, self.seconds.attend)  # type: ignore[no-untyped-call]
        if self.plan is None:
            return Attended(hidden, hidden, None)
        rows, sent = dispatcher.permute(hidden.flatten(0, 1), self.factors, self.plan)
        return Attended(x, hidden, Routed(rows, sent, self.factors, self.plan))

    def dense(self, residual: Tensor, hidden: Tensor) -> Tensor:
        return residual

    def expert(self, residual: Tensor, hidden: Tensor, arrived: Arrived) -> tuple[Tensor, Tensor]:
        assert self.seconds.expert is not None
        rows = _Sleeps.apply(arrived.rows, self.weight, self.seconds.expert)  # type: ignore[no-untyped-call]
        return residual, rows


class _Head(nn.Module):
    def forward(self, hidden: Tensor, labels: Tensor, denominator: int) -> Tensor:
        return hidden.mean() / denominator


class SleepingChunk(nn.Module):
    """What the executor and autograd want of a ``Chunk``: its layers and both ends."""

    def __init__(self, layers: range, of: int, shape: Shape, seconds: Seconds, experts: int = 0):
        """Layers ``layers`` of ``of``; ``experts``: of a whole layer, if it has any."""
        super().__init__()
        self.model = nn.Module()
        if layers.start == 0:
            self.model.embed_tokens = Embedding(_VOCABULARY, shape.hidden, torch.float32)
            nn.init.ones_(self.model.embed_tokens.weight)
        plan = None
        if experts:
            indices = torch.arange(shape.tokens * shape.choices) % experts
            plan = plan_dispatch(indices.view(shape.tokens, shape.choices), experts)
        self.model.layers = nn.ModuleDict(
            {str(i): SleepingLayer(i, shape, seconds, plan) for i in layers}
        )
        if layers.stop == of:
            self.model.norm = nn.Identity()
            self.lm_head = _Head()


@dataclass
class Sleeper:
    """One rank's executor on sleeping chunks, and what it takes to run a step of it."""

    executor: Executor
    work: Work

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        group: Group,
        dispatcher: Dispatcher,
        shape: Shape,
        seconds: Seconds,
        layers: int = 1,
        experts: int = 0,
    ) -> "Sleeper":
        """The rank at ``group.index`` of a pipeline; every stage holds ``layers`` layers."""
        total = layers * schedule.stages
        chunks = {
            stage: SleepingChunk(
                range(stage * layers, (stage + 1) * layers), total, shape, seconds, experts
            )
            for stage in range(schedule.stages)
            if schedule.placement[stage] == group.index
        }
        config = model_config(shape, total)
        model = RankModel(config, cast(dict[int, Chunk], chunks))
        tokens = torch.zeros(1, shape.tokens, dtype=torch.int64)
        batches = [DeviceBatch(tokens, tokens, None)] * schedule.microbatches
        record = StepRecord.for_model(config, tau=None)
        return cls(
            Executor(schedule, model, dispatcher, group),
            Work(batches, record, 1, lambda loss: None),
        )

    def step(self) -> None:
        self.executor.run(self.work)


def message_seconds(group: Group, shape: Shape, times: int = 20) -> float:
    """How long a message of ``shape`` takes between the first two ranks of ``group``.

    All its ranks call this together; the median of ``times`` there and back, halved.
    """
    tensor, found = torch.zeros(1, shape.tokens, shape.hidden), []
    for _ in range(times):
        started = time.perf_counter()
        if group.index == 0:
            coming = group.receive(torch.empty_like(tensor), 1)
            group.send(tensor, 1).wait()
            coming.wait()
        elif group.index == 1:
            coming = group.receive(torch.empty_like(tensor), 0)
            coming.wait()
            group.send(tensor, 0).wait()
        found.append((time.perf_counter() - started) / 2)
    seconds = torch.tensor([statistics.median(found)])
    group.broadcast(seconds).wait()
    return float(seconds)


def wake_on_time() -> bool:
    """Let this rank run as soon as it wakes, other programs or not; whether the machine allows it.

    Ranks that sleep take little of a core, and real-time priority takes it at the right time.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True


def print_priority() -> None:
    """Say whether the ranks of this benchmark will wake on time."""
    allowed = wake_on_time()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    print(f"ranks sleep at {'real-time' if allowed else 'no'} priority", flush=True)
