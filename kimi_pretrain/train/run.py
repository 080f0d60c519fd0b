"""A run assembled from its configuration: data, model, optimizer, checkpoints, sinks."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_pretrain.checkpoint.state import restore, snapshot
from kimi_pretrain.checkpoint.store import (
    CheckpointError,
    checkpoint_step,
    latest_verified,
    list_checkpoints,
    remove_unfinished,
)
from kimi_pretrain.checkpoint.writer import CheckpointWriter
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.saved import require_same_run, save_config
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch, Prefetcher, TrainStream, heldout_windows
from kimi_pretrain.data.corpus import ensure
from kimi_pretrain.data.lock import exclusive
from kimi_pretrain.data.prepared import PreparedData
from kimi_pretrain.data.progress import console as progress_display
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.lr import total_steps
from kimi_pretrain.optim.registry import build_optimizer
from kimi_pretrain.plan.flops import training_flops_per_token
from kimi_pretrain.plan.parameters import count_parameters
from kimi_pretrain.telemetry.console import Console
from kimi_pretrain.telemetry.quantities import count as written
from kimi_pretrain.telemetry.sinks import Sinks, check_sinks, open_sinks
from kimi_pretrain.train.step import TrainStep
from kimi_pretrain.train.throughput import measure_matmul_peak

CONFIG = "config.yaml"


@dataclass
class Run:
    """Everything the loop needs, opened; `first_step` steps are already done."""

    config: Config
    directory: Path
    data: PreparedData
    heldout: list[tuple[str, Batch]]  # (domain, windows)
    model: CausalLM
    train_step: TrainStep
    writer: CheckpointWriter
    sinks: Sinks
    console: Console
    first_step: int
    total_steps: int
    tokens_per_step: int
    flops_per_token: int
    peak_flops: float
    opened: float  # time.perf_counter() when assembly began
    lock: ExitStack  # held until the run is closed

    def stream(self, first_sample: int, count: int) -> AbstractContextManager[Iterator[Batch]]:
        """Global batches of `count` samples from `first_sample` on, read ahead by a thread."""
        stream = TrainStream(self.data, self.config.data, self.config.seed)
        return Prefetcher(stream, count, first_sample)

    def save(self, step: int) -> None:
        """Checkpoint the state after `step` in the background."""
        state = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "dtype": str(next(self.model.parameters()).dtype),
        }
        self.writer.save(step, snapshot(self.model, self.train_step.optimizer, state))

    def close(self) -> None:
        """Put the last checkpoint and every row on disk."""
        try:
            self.writer.close()
        finally:
            self.sinks.close()
            self.console.close()
            self.lock.close()


def open_run(config: Config) -> Run:
    """Assemble the run of `config` and restore its last verified checkpoint, if any.

    Raises ConfigError when the data does not fit the model, the run directory belongs to
    another run, or an optional package of a chosen sink is missing.
    """
    opened = time.perf_counter()
    directory = Path(config.run_dir)
    console = Console(config.logging)
    lock = _lock(directory)
    check_sinks(config)
    with progress_display() as progress:
        data = ensure(config.data, progress)
    _require_vocabulary(config, data)
    dtype = resolve(config.precision)
    device = _device()
    model = from_config(config.model, dtype=dtype, device=device, seed=config.seed)
    optimizer = build_optimizer(config.optimizer, config.model, model.named_parameters())
    train_step = TrainStep(config, model, optimizer)
    first_step = _restore(config, directory, train_step, console)
    save_config(config, directory / CONFIG)
    tokens_per_step = config.schedule.global_batch_size * config.data.sequence_length
    sinks = open_sinks(config, directory, first_step)
    run = Run(
        config=config,
        directory=directory,
        data=data,
        heldout=list(
            heldout_windows(
                data,
                config.data,
                config.schedule.eval_sequences,
                config.schedule.micro_batch_size,
            )
        ),
        model=model,
        train_step=train_step,
        writer=CheckpointWriter(directory / "checkpoints", config.schedule.keep_checkpoints),
        sinks=sinks,
        console=console,
        first_step=first_step,
        total_steps=total_steps(config.schedule, tokens_per_step),
        tokens_per_step=tokens_per_step,
        flops_per_token=training_flops_per_token(config.model, config.data.sequence_length),
        peak_flops=config.cluster.peak_flops or measure_matmul_peak(dtype, device),
        opened=opened,
        lock=lock,
    )
    _require_heldout(run)
    _require_samples(run)
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
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}, "
        f"{torch.get_num_threads()} threads, matmul peak {run.peak_flops / 1e9:,.0f} GFLOP/s",
    }


def _lock(directory: Path) -> ExitStack:
    """Make the run directory and keep every other start out of it until this one ends."""
    lock = ExitStack()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        alone = lock.enter_context(exclusive(directory / ".lock", wait=False))
    except OSError as error:
        raise ConfigError(
            "run_dir", str(directory), f"it must be writable ({error.strerror})", "run_dir=DIR"
        ) from error
    if not alone:
        raise ConfigError(
            "run_dir",
            str(directory),
            "another process is training in it, and two would mix their rows and checkpoints",
            "another run_dir, or wait until it ends",
        )
    return lock


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


def _device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def _require_vocabulary(config: Config, data: PreparedData) -> None:
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"the tokenizer of data={config.data.name} has {data.tokenizer.vocab_size} ids and "
            "every id needs an embedding",
            f"model.vocab_size={data.tokenizer.vocab_size}",
        )


def _restore(config: Config, directory: Path, train_step: TrainStep, console: Console) -> int:
    """Load the newest checkpoint that verifies; the number of steps that are done."""
    root = directory / "checkpoints"
    remove_unfinished(root)
    found = list_checkpoints(root)
    if not found:
        if (directory / "summary.json").exists():
            raise ConfigError(
                "run_dir",
                config.run_dir,
                "it holds a finished run whose checkpoints are gone, and starting over would "
                "replace its record",
                "another run_dir",
            )
        return 0
    if not config.resume:
        raise ConfigError(
            "run_dir",
            config.run_dir,
            f"it holds checkpoints up to step {checkpoint_step(found[0])} and resume=false "
            "must not overwrite them",
            "another run_dir, or resume=true to go on",
        )
    require_same_run(config, directory / CONFIG)
    latest = latest_verified(root, lambda error: console.note(f"skipped a checkpoint: {error}"))
    if latest is None:
        raise ConfigError(
            "run_dir",
            config.run_dir,
            f"none of its {len(found)} checkpoints verifies and a resume must not start over",
            "another run_dir, or a copy of the checkpoints that is whole",
        )
    try:
        state = restore(latest, train_step.model, train_step.optimizer)
    except CheckpointError as error:
        raise ConfigError(
            "checkpoint", str(latest), str(error), "the configuration it was written with"
        ) from error
    dtype = str(next(train_step.model.parameters()).dtype)
    if state["dtype"] != dtype:
        raise ConfigError(
            "precision",
            config.precision,
            f"it means {dtype} on this machine and the checkpoints of {directory} were trained "
            f"in {state['dtype']}",
            "precision=bf16, fp32 or fp64, as the run was started",
        )
    console.note(f"resumed from {latest} ({state['tokens']:,} tokens)")
    return int(state["step"])
