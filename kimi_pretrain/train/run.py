"""A run assembled from its configuration: data, model, optimizer, checkpoints, sinks."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from kimi_pretrain.checkpoint.run_lock import hold_run_dir
from kimi_pretrain.checkpoint.state import snapshot
from kimi_pretrain.checkpoint.writer import CheckpointWriter
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import save_config
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.data.batches import Batch, Prefetcher, TrainStream, heldout_windows
from kimi_pretrain.data.corpus import ensure
from kimi_pretrain.data.prepared import PreparedData
from kimi_pretrain.data.progress import console as progress_display
from kimi_pretrain.data.progress import silent
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.ops.registry import summary
from kimi_pretrain.optim.lr import total_steps
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.parallel.world import World
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.plan.flops import training_flops_per_token
from kimi_pretrain.plan.parameters import count_parameters
from kimi_pretrain.telemetry.console import Console
from kimi_pretrain.telemetry.goodput import Goodput, launched
from kimi_pretrain.telemetry.quantities import count as written
from kimi_pretrain.telemetry.sinks import Sinks, check_sinks, open_sinks
from kimi_pretrain.train.activations import cramped, needless
from kimi_pretrain.train.agreement import agreed_run_dir
from kimi_pretrain.train.comparison import Comparison, gpu_of
from kimi_pretrain.train.resume import CONFIG, restore_latest
from kimi_pretrain.train.schedule import stages_of
from kimi_pretrain.train.step import TrainStep
from kimi_pretrain.train.throughput import measure_matmul_peak
from kimi_pretrain.train.together import together


@dataclass
class Run:
    """Everything the loop needs, opened; `first_step` steps are already done.

    Every rank has one. Only the first one's console, sinks and lock do anything.
    """

    config: Config
    directory: Path
    world: World
    data: PreparedData
    heldout: list[tuple[str, Batch]]  # (domain, windows)
    train_step: TrainStep
    forward: ForwardPipeline
    writer: CheckpointWriter
    sinks: Sinks
    console: Console
    first_step: int
    total_steps: int
    tokens_per_step: int
    flops_per_token: int
    peak_flops: float
    opened: float  # time.perf_counter() when assembly began
    goodput: Goodput
    comparison: Comparison
    lock: ExitStack  # held until the run is closed

    def stream(
        self, first_sample: int, count: int, stride: int
    ) -> AbstractContextManager[Iterator[Batch]]:
        """`count` samples from `first_sample` on, then from `stride` further, and so on.

        Read ahead by a thread.
        """
        stream = TrainStream(self.data, self.config.data, self.config.seed)
        return Prefetcher(stream, count, first_sample, stride)

    def save(self, step: int) -> None:
        """Checkpoint the state after `step` in the background."""
        state = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "dtype": str(self.forward.model.dtype),
        }
        share = snapshot(
            self.forward.model,
            self.train_step.optimizer,
            state,
            self.world.rank,
            self.world.size,
            self.world.dp.index == 0,
        )
        self.writer.save(step, share)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the last checkpoint and every row on disk."""
        lost = isinstance(error, PeerError)
        if lost:
            self.writer.abandon()  # the missing rank's files will not come
        try:
            self.writer.close()
        except PeerError:
            if not lost:  # else a consequence: the error on its way says which peer is lost
                raise
        finally:
            self.sinks.close()
            self.console.close()
            self.lock.close()


def open_run(config: Config, world: World) -> Run:
    """Assemble the run of `config` and restore its last verified checkpoint, if any.

    Raises:
        ConfigError: on every rank, when the data does not fit the model, the run directory
            belongs to another run, or an optional package of a chosen sink is missing.
    """
    opened, began = time.perf_counter(), time.time()
    config = replace(config, run_dir=agreed_run_dir(world, config))
    if not world.is_first:
        config = replace(config, logging=replace(config.logging, console="off"))
    directory = Path(config.run_dir)
    console = Console(config.logging)
    lock = together(world, lambda: hold_run_dir(directory) if world.is_first else ExitStack())
    data = together(world, lambda: _data(config, world))
    dtype, device = resolve(config.precision), world.device
    train_step = together(world, lambda: TrainStep.open(config, dtype, world))
    first_step = restore_latest(config, directory, train_step, console)
    if world.is_first:
        save_config(config, directory / CONFIG)
    tokens_per_step = config.schedule.global_batch_size * config.data.sequence_length
    sinks = together(
        world,
        lambda: open_sinks(config, directory, first_step) if world.is_first else Sinks([]),
    )
    steps = total_steps(config.schedule, tokens_per_step)
    goodput = Goodput(began, productive=0.0)
    if world.is_first:
        goodput = launched(
            directory, began, ranks=world.size, first_step=first_step, total_steps=steps
        )
    gpu, why_not = gpu_of(device)
    if why_not:
        console.note(why_not)
    schedule = train_step.executor.schedule
    for advice in (needless(config, dtype), cramped(config, schedule, stages_of(config), dtype)):
        if advice:
            console.note(advice)
    run = Run(
        config=config,
        directory=directory,
        world=world,
        data=data,
        heldout=list(
            heldout_windows(
                data,
                config.data,
                config.schedule.eval_sequences,
                micro_batch_size(config),
            )
        ),
        train_step=train_step,
        forward=ForwardPipeline(
            train_step.model,
            train_step.dispatcher,
            world.pp,
            train_step.executor.schedule.placement,
        ),
        writer=CheckpointWriter(
            directory / "checkpoints",
            config.schedule.keep_checkpoints,
            world.rank,
            world.size,
            config.parallel.timeout_seconds,
        ),
        sinks=sinks,
        console=console,
        first_step=first_step,
        total_steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_token=training_flops_per_token(config.model, config.data.sequence_length),
        peak_flops=_peak_flops(config, world, dtype),
        opened=opened,
        goodput=goodput,
        comparison=Comparison(world, gpu),
        lock=lock,
    )
    together(world, lambda: _require_heldout(run))
    together(world, lambda: _require_samples(run))
    together(world, lambda: _require_traced_step(run))
    console.start(run.total_steps, first_step, _facts(run, dtype, device))
    return run


def _facts(run: Run, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What a person wants to know before the first step."""
    config, count = run.config, count_parameters(run.config.model)
    tokens = run.total_steps * run.tokens_per_step
    return {
        "run": str(run.directory),
        "model": f"{config.model.name}, {count.total / 1e6:,.1f}M parameters, "
        f"{count.active_with_head / 1e6:,.1f}M active a token (head included)",
        "data": f"{', '.join(run.data.domains)}; {run.data.tokenizer.vocab_size:,} token ids",
        "steps": f"{run.total_steps:,} x {run.tokens_per_step:,} tokens = {written(tokens)}",
        **_ranks(run),
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}, "
        f"{_counted(torch.get_num_threads(), 'thread')} a rank, "
        f"matmul peak {run.peak_flops / 1e9:,.0f} GFLOP/s",
        "kernels": summary(config.kernels, device.type, dtype),
    }


def _ranks(run: Run) -> dict[str, str]:
    topology = run.world.topology
    if topology.world == 1:
        return {}
    stages = f"{topology.pp} x {run.config.parallel.vpp} stages, " if topology.pp > 1 else ""
    return {
        "ranks": f"{topology.world}: {stages}{topology.dp} replicas of the dense parameters, "
        f"experts over {topology.ep}, {_counted(topology.edp, 'replica')} of each"
    }


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _data(config: Config, world: World) -> PreparedData:
    """The corpus, checked against the model; built by one rank, the others wait for it."""
    check_sinks(config)
    with progress_display() if world.is_first else nullcontext(silent) as progress:
        data = ensure(config.data, progress)
    _require_vocabulary(config, data)
    return data


def _peak_flops(config: Config, world: World, dtype: torch.dtype) -> float:
    """Of all ranks together. On CPUs measured, on all at once: ranks of one machine share its
    cores, and a cluster's figure is that of one core in bf16."""
    if config.cluster.peak_flops and config.cluster.device != "cpu":
        return config.cluster.peak_flops * world.size
    world.everyone.barrier()
    peak = torch.tensor([measure_matmul_peak(dtype, world.device)], dtype=torch.float64)
    peak = peak.to(world.device)
    world.everyone.all_reduce_sum(peak).wait()
    return float(peak)


def _require_heldout(run: Run) -> None:
    if not run.heldout:
        raise ConfigError(
            "data.domains",
            ", ".join(run.data.domains),
            "a run measures held-out loss and no domain has held-out files",
            "data.domains.NAME.heldout=PREFIX, made by `data prepare --heldout 0.01`",
        )


def _require_samples(run: Run) -> None:
    """A mixture that ends must not end before the schedule does."""
    samples = TrainStream(run.data, run.config.data, run.config.seed).samples
    needed = run.total_steps * run.config.schedule.global_batch_size
    if samples is not None and samples < needed:
        raise ConfigError(
            "data.mixture",
            f"{samples * run.config.data.sequence_length} tokens",
            f"the schedule reads {run.total_steps * run.tokens_per_step}",
            "a last mixture stage without `tokens`, which stays open",
        )


def _require_traced_step(run: Run) -> None:
    traced, last = run.config.logging.trace_step, run.total_steps
    if traced is not None and traced > last:
        rule = f"the step to trace is one of the run's, 1 to {last}"
        raise ConfigError("logging.trace_step", traced, rule, f"logging.trace_step={last}")


def _require_vocabulary(config: Config, data: PreparedData) -> None:
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the tokenizer of data={config.data.name} has {data.tokenizer.vocab_size} ids and "
            "every id needs an embedding",
            f"model.vocab_size={data.tokenizer.vocab_size}",
        )
