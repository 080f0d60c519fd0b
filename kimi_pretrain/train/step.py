"""One optimizer step: microbatches forwards and backwards, guards, clip, update."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_pretrain.activation.offload import Moved
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.microbatch import DeviceBatch
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.optim.registry import build_sharded
from kimi_pretrain.parallel.dispatch import Dispatcher
from kimi_pretrain.parallel.errors import during
from kimi_pretrain.parallel.stopwatch import Stopwatch
from kimi_pretrain.parallel.world import World
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.execute import Executor, Work
from kimi_pretrain.train.activations import open_activations
from kimi_pretrain.train.guards import require_finite
from kimi_pretrain.train.model import open_model
from kimi_pretrain.train.observations import Observations
from kimi_pretrain.train.schedule import stages_of, training_schedule


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank. `record` holds the per-layer arrays."""

    loss: float  # nats a label, mean over the global batch
    grad_norm: float  # global, before clipping
    record: StepRecord
    stop: bool  # some rank was asked to stop before the step's last backward
    moved: Moved | None = None  # this rank's activations to the host and back; None: none may


def to_device(batch: Batch, rows: slice, device: torch.device) -> DeviceBatch:
    """The chosen rows of `batch` as tensors."""
    documents = batch.document_ids
    return DeviceBatch(
        tokens=torch.from_numpy(batch.tokens[rows]).to(device),
        labels=torch.from_numpy(batch.labels[rows]).to(device),
        document_ids=None if documents is None else torch.from_numpy(documents[rows]).to(device),
    )


class TrainStep:
    """Runs the steps of one rank's model; holds nothing but the optimizer between steps.

    With one rank and with thousands these are the same lines: groups of one copy nothing.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        model: RankModel,
        dispatcher: Dispatcher,
        world: World,
    ) -> None:
        self.config, self.model, self.dispatcher, self.world = config, model, dispatcher, world
        self.optimizer = build_sharded(config.optimizer, config.parallel, model, world)
        self.stopwatch = Stopwatch(world.device)
        activations = open_activations(
            config,
            schedule,
            stages_of(config),
            world.pp.index,
            model.dtype,
            model.device,
            self.stopwatch,
        )
        self.executor = Executor(schedule, model, dispatcher, world.pp, activations=activations)
        for group in (world.ep, world.pp, world.edp, world.dp, world.everyone):
            group.stopwatch = self.stopwatch

    @classmethod
    def open(cls, config: Config, dtype: torch.dtype, world: World) -> "TrainStep":
        """The step of this rank with a new model.

        Raises:
            ConfigError: no such schedule, or the dispatcher cannot run here.
        """
        schedule = training_schedule(config)
        return cls(config, schedule, *open_model(config, schedule.placement, dtype, world), world)

    def run(
        self,
        step: int,
        batch: Batch,
        learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Accumulate the gradients of `batch`, this replica's part, then update once.

        Every microbatch divides by the number of labels of the global batch, so that the
        result does not depend on how the batch is cut, and gradients are summed over
        replicas, never averaged. Whether this rank was asked to `stop` is looked up before the
        last backward, and told to all.

        Raises:
            GuardStop: on all ranks, with all weights untouched, when the loss or a gradient
                anywhere is not finite.
            PeerError: another rank failed or did not answer in time; says in what.
        """
        self.stopwatch.enter("compute")
        activations = self.executor.activations
        activations.marked.clear()
        offloader = activations.offloader
        if offloader is not None:
            offloader.moved = Moved()
        observations = self._accumulate(batch, stop)
        optimizer = self.optimizer
        with during(f"reducing the gradients of step {step}"):
            optimizer.buffers.reduced()
        with during(f"combining what ranks observed in step {step}"):
            loss, stops = observations.combined()
        record = observations.record
        with during(f"adding up the gradient norm of step {step}"):
            norm = float(optimizer.norm())
            require_finite(step, loss, norm, self._suspects)
        self.stopwatch.enter("optimizer")
        with during(f"updating the weights in step {step}"):
            optimizer.clip_gradients(norm, self.config.optimizer.grad_clip)
            optimizer.observe_max_logits(record.max_logits, record.exact)
            optimizer.step(learning_rate)
        self.model.update_router_bias(record, self.config.optimizer.router_bias_rate)
        moved = None if offloader is None else offloader.moved
        return StepResult(loss=loss, grad_norm=norm, record=record, stop=stops, moved=moved)

    def empty_record(self, sequences: int) -> StepRecord:
        """What a step observes of ``sequences``, this replica's part, before its first forward."""
        size = micro_batch_size(self.config)
        return StepRecord.for_model(
            self.config.model,
            tau=self.config.optimizer.qk_clip_threshold,
            aux_scale=size / (sequences * self.world.dp.size),
            device=self.model.device,
            dtype=accumulate_dtype(self.model.dtype),
        )

    def _accumulate(self, batch: Batch, stop: Callable[[], bool]) -> Observations:
        size = micro_batch_size(self.config)
        sequences = len(batch.tokens)
        device = self.model.device
        labels = torch.tensor(int((batch.labels >= 0).sum()), device=device)
        counting = self.world.dp.all_reduce_sum(labels)
        record = self.empty_record(sequences)
        microbatches = [
            to_device(batch, slice(first, first + size), device)
            for first in range(0, sequences, size)
        ]
        buffers = self.optimizer.buffers
        buffers.zero()
        buffers.expect(len(microbatches))
        observations: list[Observations] = []

        def forwards_done(loss: Tensor) -> None:
            observations.append(Observations(record, loss, stop(), self.world.everyone))

        with during("counting the labels of the global batch"):
            counting.wait()
        self.executor.run(Work(microbatches, record, int(labels), forwards_done))
        return observations[0]

    def _suspects(self) -> dict[str, list[str]]:
        """What was not finite, and whose; every rank's, on every rank."""
        names = self.optimizer.nonfinite()
        more = [f"{len(names) - 4} more"] if len(names) > 4 else []
        marked = self.executor.activations.marked_by_tag()
        tiles = [f"{tag} ({count:,})" for tag, count in marked.items()]
        return {
            "gradients not finite": self._told([*names[:4], *more]),
            "FP8 tiles with a NaN or an infinity": self._told(tiles),
        }

    def _told(self, own: list[str]) -> list[str]:
        """The lines of all ranks, each with the rank's number where there are several."""
        rank = f"rank {self.world.rank}: " if self.world.size > 1 else ""
        told = self.world.everyone.gather_texts("\n".join(rank + line for line in own))
        return [line for text in told if text for line in text.splitlines()]
