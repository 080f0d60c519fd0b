"""The training loop: assemble a run, go on from its last checkpoint, step, watch, end.

A run is a pure function of its configuration: sample i of the data is addressed by i, the
initial weights by the seed, and nothing else is random. A resume therefore needs the
weights, the optimizer state and one integer, and continues bitwise.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from kimi_pretrain.checkpoint.run_lock import hold_run_dir
from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.optim.lr import learning_rate
from kimi_pretrain.parallel.rendezvous import Place
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.agreement import facts_of_run
from kimi_pretrain.train.ending import evaluate_run, finish
from kimi_pretrain.train.evaluate import Evaluation
from kimi_pretrain.train.guards import (
    GuardStop,
    StopRequest,
    stop_on_signal,
)
from kimi_pretrain.train.metrics import evaluation_row, layers_row, step_row
from kimi_pretrain.train.run import Run, open_run
from kimi_pretrain.train.step import StepResult
from kimi_pretrain.train.trace import traced


def train(config: Config) -> int:
    """Train until the schedule's end; returns the process's exit code (docs/exit-codes.md).

    Raises:
        ConfigError: on all ranks, before anything is trained, for what only the other ranks,
            the data, the run directory or an optional package can show to be wrong.
        PeerError: another rank failed or did not answer in time.
    """
    place = Place.of_environment()
    if place.rank == 0 and place.world == Topology.of_config(config.parallel).world:
        hold_run_dir(Path(config.run_dir)).close()  # refused before ranks wait for one another
    facts = facts_of_run(config)
    with open_world(config.parallel, facts) as world, stop_on_signal() as stop:
        run = open_run(config, world)
        with run:
            try:
                code, evaluation = _steps(run, stop)
                if code == exit_codes.DONE:
                    finish(run, evaluation)
            except GuardStop as reason:
                run.console.note(f"stopped by a guard: {reason}")
                code = exit_codes.GUARD
        # The first rank to leave with a code makes torchrun end the others: leave together.
        world.everyone.barrier()
        if code == exit_codes.DONE and config.logging.report and world.is_first:
            _report(run)
    return code


def _steps(run: Run, stop: StopRequest) -> tuple[int, Evaluation | None]:
    """The exit code and the evaluation after the last step, if this start took it.

    Rows of a step are written before its checkpoint: a start that finds the checkpoint
    finds the rows too, and one that does not cuts them off and writes them again.
    """
    every = run.config.schedule
    evaluation = None
    saving = 0.0  # seconds for which the last step's checkpoint held up the loop
    for step, batch in _batches(run):
        rate = learning_rate(every, run.config.optimizer.lr, run.tokens_per_step, step - 1)
        with _trace(run, step):
            result = run.train_step.run(step, batch, rate, stop.__bool__)
        # Several ranks stop together, at the step for which one of them asked in time.
        stopping = bool(stop) if run.world.size == 1 else result.stop
        _log_step(run, step, result, rate, saving)
        saving = 0.0
        last = step == run.total_steps
        if last or (every.eval_interval and step % every.eval_interval == 0):
            evaluation = evaluate_run(run)
            _log_evaluation(run, step, evaluation)
        if (
            stopping
            or last
            or (every.checkpoint_interval and step % every.checkpoint_interval == 0)
        ):
            began = time.perf_counter()
            run.save(step)
            saving = time.perf_counter() - began
        if stopping and not last:
            reason = stop.signal_name or "a signal to another rank"
            run.console.note(
                f"{reason}: stopped after step {step} with a checkpoint; "
                f"go on with run_dir={run.directory}"
            )
            return exit_codes.SIGNAL, None
    return exit_codes.DONE, evaluation


def _trace(run: Run, step: int) -> AbstractContextManager[None]:
    if step != run.config.logging.trace_step:
        return nullcontext()
    return traced(run.train_step.executor, run.world, run.directory / "trace")


def _batches(run: Run) -> Iterator[tuple[int, Batch]]:
    """(step, this replica's part of its batch), from the first step that is not done.

    Steps count from 1. A step's time begins with the wait for its data.
    """
    size = run.config.schedule.global_batch_size
    part = size // run.world.dp.size
    first = run.first_step * size + run.world.dp.index * part
    with run.stream(first_sample=first, count=part, stride=size) as batches:
        for step in range(run.first_step + 1, run.total_steps + 1):
            run.train_step.stopwatch.start("data")
            yield step, next(batches)


def _log_step(run: Run, step: int, result: StepResult, rate: float, saving: float) -> None:
    config = run.config
    parts = run.train_step.stopwatch.stop()
    run.comparison.add(parts)
    row = step_row(
        result,
        step=step,
        tokens_per_step=run.tokens_per_step,
        learning_rate=rate,
        parts=parts,
        checkpoint_seconds=saving,
        goodput=run.goodput.step(sum(parts.values())),
        flops_per_token=run.flops_per_token,
        peak_flops=run.peak_flops,
        clipped_heads=float(run.train_step.optimizer.qk_clip_metrics["share_clipped"] or 0.0),
    )
    run.sinks.row("step", row)
    run.console.step(row)
    if step % config.logging.layer_interval == 0 or step == run.total_steps:
        tau = config.optimizer.qk_clip_threshold
        run.sinks.row("layers", layers_row(step, result.record, tau))
    if step % config.logging.rank_interval == 0 or step == run.total_steps:
        run.sinks.row("ranks", run.comparison.row(step))


def _log_evaluation(run: Run, step: int, evaluation: Evaluation) -> None:
    row = evaluation_row(step, step * run.tokens_per_step, evaluation)
    run.sinks.row("eval", row)
    run.console.evaluation(row)


def _report(run: Run) -> None:
    from kimi_pretrain.telemetry.report import write_report  # matplotlib: only when it is drawn

    page = write_report(Path(run.directory))
    run.console.note(f"report: {page}")
