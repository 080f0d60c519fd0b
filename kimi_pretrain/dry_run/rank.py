"""One rank's step, run without memory, and what was counted on the way."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.dry_run.memory import LiveBytes
from kimi_pretrain.dry_run.mirrored import mirrored_world
from kimi_pretrain.dry_run.put_off import watch_products
from kimi_pretrain.dry_run.step import DryStep
from kimi_pretrain.dry_run.unknown import Unknown
from kimi_pretrain.parallel.topology import Coordinates
from kimi_pretrain.pipeline.timeline import COMPUTE

_MESSAGE = "message"
_LEARNING_RATE = 1e-3  # multiplies nothing that anybody knows
_COLLECTION = 50_000  # objects made and not freed
_CLIPS = 0.5  # a threshold below what an unknown logit reads as


@dataclass(frozen=True)
class RankRun:
    """What a rank held and sent in one step; bytes."""

    rank: int
    at: Coordinates
    parameters: int
    gradients: int
    optimizer: int
    kept: dict[int, int]  # stage -> what a forward leaves there for its backward
    resting: int  # what all forwards have left, between two actions, at its most
    until_w: int  # gradients of outputs that weight gradients wait with, likewise
    flying: int  # rows of all-to-alls between experts that were on their way, in and out, likewise
    moving: int  # all that is alive at the end of a phase beside what is always there, likewise
    peak: int  # all that is alive, temporaries of operations included, likewise
    host: int  # of offloaded activations, likewise
    sent: dict[str, dict[str, int]]  # group -> operation -> bytes
    between_nodes: dict[str, dict[str, int]]  # of what has one receiver, likewise
    calls: dict[str, dict[str, int]]  # likewise: how often
    nodes: int  # of the schedule
    operations: int  # of torch
    clipped: int  # heads
    seconds: float
    cpu_seconds: float  # of all threads: what of it does not depend on other processes


class _Watch:
    """Looks at what is alive at the end of every phase."""

    def __init__(self, memory: LiveBytes) -> None:
        self.memory = memory
        self.always = 0  # alive before the step began
        self.moving = self.resting = 0
        self.kept: dict[int, int] = {}
        self._inputs: Mapping[int, int] = {}
        self._node = self._forward = ""

    def begin(self, inputs: Mapping[int, int]) -> None:
        """The step begins: what is alive now always is.

        ``inputs`` are the bytes that a stage keeps of a message; of other stages it is nothing.
        """
        self.always, self._inputs = self.memory.now, inputs
        self.memory.label("always")

    def received(self, buffer: Tensor) -> None:
        """A message's memory, which no action makes."""
        del buffer
        self.memory.label(_MESSAGE)

    def observe(self, node: str, resource: str, name: str, start: float, end: float) -> None:
        """A phase has been computed: what it made and is still alive is its action's."""
        del start, end
        if resource != COMPUTE:
            return
        if node != self._node:
            self._rest(node)
        action, phase = name.split(" ", 1)
        self.memory.label(action)
        self.moving = max(self.moving, self.memory.now - self.always)
        if _is_forward(action) and not node.startswith("("):  # of a pair neither ends by itself
            self._forward = action
            if phase == "head":  # the backward of the same microbatch may be next
                self.memory.before_next = partial(self._rest, node)

    def _rest(self, node: str) -> None:
        """A forward is over: what it made and is still alive, it keeps."""
        if self._forward:
            stage, size = _stage(self._forward), self.memory.of[self._forward]
            # The first one of a step also has what was made before it: the batch.
            self.kept[stage] = min(size, self.kept.get(stage, size))
            self.resting = max(self.resting, sum(map(self._left, list(self.memory.of))))
        self._node, self._forward = node, ""

    def _left(self, action: str) -> int:
        """What a forward keeps now, with its input if it has not had its backward."""
        if not _is_forward(action):
            return 0
        size, stage = self.memory.of[action], _stage(action)
        waits = size > self.kept.get(stage, 0) / 2
        return size + waits * self._inputs.get(stage, 0)


def dry_run_rank(config: Config, rank: int) -> RankRun:
    """Open and run one step of ``rank``, as ``train`` would on that many ranks.

    Args:
        config: settled; its activation policy and dispatcher are the ones that are run.
        rank: global.

    Raises:
        ConfigError: ``train`` would refuse it.
    """
    started, used = time.monotonic(), time.process_time()
    if config.optimizer.qk_clip_threshold is not None:
        config = replace(config, optimizer=replace(config.optimizer, qk_clip_threshold=_CLIPS))
    memory = LiveBytes()
    watch = _Watch(memory)
    with Unknown(memory) as mode:
        per_node = config.cluster.gpus_per_node
        world = mirrored_world(config.parallel, rank, watch.received, per_node)
        step = DryStep.open(config, torch.bfloat16, world)
        put_off = watch_products(step.model, step.executor.deferral, memory)
        schedule, here = step.executor.schedule, world.pp.index
        message = micro_batch_size(config) * config.data.sequence_length
        message *= config.model.hidden_size * torch.bfloat16.itemsize
        watch.begin(
            {s: message for s in step.model.chunks if s and schedule.placement[s - 1] != here}
        )
        step.executor.observe = watch.observe
        with _rare_collections():
            step.run(1, _batch(config), _LEARNING_RATE)
    optimizer = step.optimizer
    buckets = optimizer.buffers.buckets
    offloader = step.executor.activations.offloader
    slab = None if offloader is None else offloader.slab.spans
    groups = {group.kind: group for group in world.mirrored()}
    return RankRun(
        rank=rank,
        at=world.topology.coordinates(rank),
        parameters=sum(bucket.parameters.nbytes for bucket in buckets),
        gradients=sum(bucket.gradients.nbytes for bucket in buckets),
        optimizer=sum(
            tensor.nbytes for shard in optimizer.shards for _, tensor in shard.named_state()
        ),
        kept={
            # A forward's input was there before it, and is what the one before made.
            stage: made + message * ((stage > 0) - (stage + 1 in watch.kept))
            for stage, made in watch.kept.items()
        },
        resting=watch.resting,
        until_w=put_off.most,
        flying=groups["ep"].most_flying,
        moving=watch.moving,
        peak=memory.peak - (0 if slab is None else slab.capacity),
        host=0 if slab is None else slab.most_used,
        sent={kind: dict(group.traffic.sent) for kind, group in groups.items()},
        between_nodes={kind: dict(group.between_nodes) for kind, group in groups.items()},
        calls={kind: dict(group.traffic.calls) for kind, group in groups.items()},
        nodes=len(schedule.ranks[here]),
        operations=mode.operations,
        clipped=int(optimizer.qk_clip_metrics["number_clipped"] or 0),
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - used,
    )


@contextmanager
def _rare_collections() -> Iterator[None]:
    """A collection need not look at what torch's import made, nor come every 700 objects.

    What dies in a cycle counts as alive until then: a defect of the program, and seen the better.
    """
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def _stage(action: str) -> int:
    return int(action.split("F")[0])


def _is_forward(action: str) -> bool:
    return action.rstrip("0123456789").endswith("F")


def _batch(config: Config) -> Batch:
    """This replica's part of a batch; its tokens do not matter."""
    sequences = config.schedule.global_batch_size // config.parallel.dp
    tokens = np.zeros((sequences, config.data.sequence_length), np.int64)
    return Batch(tokens, tokens, None)
