"""What a finished run says of itself: held-out loss beside a bigram's, and a sample."""

import json
import time
from pathlib import Path
from typing import Any

from kimi_pretrain.data.ngram import Bigram
from kimi_pretrain.train.evaluate import Evaluation, evaluate
from kimi_pretrain.train.generate import generate
from kimi_pretrain.train.run import Run


def evaluate_run(run: Run) -> Evaluation:
    """Held-out loss of the run's model as it is now."""
    return evaluate(
        run.forward,
        run.heldout,
        run.data.tokenizer.byte_lengths(),
        run.config.optimizer.qk_clip_threshold,
        run.world.dp,
        run.world.everyone,
    )


def finish(run: Run, evaluation: Evaluation | None) -> None:
    """Draw a sample, write the summary and show it; `evaluation` is of the last step.

    A run that had already ended keeps its summary: starting it again changes nothing. Every
    rank comes here; the first one writes.
    """
    path = Path(run.directory) / "summary.json"
    (written, *_) = run.world.everyone.gather_texts("written" if path.exists() else "")
    if written and run.first_step >= run.total_steps:
        run.console.note("this run was complete; its summary is unchanged")
        run.console.finish(json.loads(path.read_text()))
        return
    if evaluation is None:  # killed between its last checkpoint and its summary
        evaluation = evaluate_run(run)
    summary: dict[str, Any] = {
        "steps": run.total_steps,
        "tokens": run.total_steps * run.tokens_per_step,
        "seconds": time.perf_counter() - run.opened,
        "heldout_loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "domains": evaluation.domain_losses,
        "bigram_loss": _bigram_loss(run) if _wants_bigram(run) else None,
        "qk_clip_last_step": run.train_step.optimizer.qk_clip_metrics["last_step"],
    }
    summary |= _sample(run)
    run.sinks.row("summary", summary)
    run.console.finish(summary)


def _wants_bigram(run: Run) -> bool:
    return run.world.is_first and run.config.schedule.bigram_baseline


def _bigram_loss(run: Run) -> float:
    """Nats a token of a bigram model fitted to exactly the tokens this run was trained on."""
    bigram = Bigram(run.config.model.vocab_size)
    size = run.config.schedule.global_batch_size
    with run.stream(first_sample=0, count=size, stride=size) as batches:
        for _ in range(run.total_steps):
            bigram.update(next(batches))
    return bigram.loss([batch for _, batch in run.heldout])


def _sample(run: Run) -> dict[str, Any]:
    """A prompt from the held-out text and the model's continuation of it."""
    count = run.config.schedule.sample_tokens
    if count == 0:
        return {}
    tokenizer = run.data.tokenizer
    prompt = run.heldout[0][1].tokens[0, :32].tolist()
    continuation = generate(
        run.forward,
        prompt,
        count,
        context=run.config.data.sequence_length,
        vocabulary=tokenizer.vocab_size,
        stop=tokenizer.eod_id,
        ranks=run.world.everyone,
        speaks=run.world.dp.index == 0,
    )
    return {"prompt": tokenizer.decode(prompt), "sample": tokenizer.decode(continuation)}
