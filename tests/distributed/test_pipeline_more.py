"""Pipelines of real ranks: equal microbatches, many in bf16, lost ranks, held-out loss."""

import os
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.layer import Layer
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.train.evaluate import evaluate
from kimi_pretrain.train.generate import generate
from kimi_pretrain.train.step import TrainStep
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import (
    LENGTH,
    RATE,
    SEQUENCES,
    batch,
    configuration,
    open_step,
    part_of,
)


def layout(pp: int, vpp: int, schedule: str, *more: str) -> list[str]:
    return [f"parallel.pp={pp}", f"parallel.vpp={vpp}", f"parallel.schedule={schedule}", *more]


# --- the same again -------------------------------------------------------------------------


def losses_of_equal_microbatches(rank: int, world_size: int, schedule: str) -> list[float]:
    """What the head, where it is on this rank, gave for each microbatch of two steps."""
    config = configuration(1, 1, *layout(2, 2, schedule))
    step = open_step(config, torch.float64)
    losses: list[float] = []
    for chunk in step.model.chunks.values():
        if hasattr(chunk, "lm_head"):
            chunk.lm_head.register_forward_hook(lambda *a: losses.append(float(a[-1].detach())))
    rows = batch()
    assert rows.document_ids is not None
    same = [np.repeat(x[:1], SEQUENCES, 0) for x in (rows.tokens, rows.labels, rows.document_ids)]
    for number in (1, 2):
        step.run(number, Batch(*same), RATE)
    return losses


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "k2"])
def test_equal_microbatches_have_equal_losses(schedule: str) -> None:
    """Catches activations that are mixed up between microbatches: with 2 ranks of 2 stages,
    neighbours exchange two streams of messages each way."""
    first, last = run_ranks(2, losses_of_equal_microbatches, schedule)
    assert first == []
    assert len(last) == 2 * SEQUENCES
    before, after = last[:SEQUENCES], last[SEQUENCES:]
    assert len(set(before)) == len(set(after)) == 1
    assert before[0] != after[0]


def repeat_a_step(rank: int, world_size: int, schedule: str) -> bool:
    """Whether four steps on the same weights give the same bits."""
    still = ("optimizer.router_bias_rate=0", "optimizer.weight_decay=0")
    config = configuration(2, 2, *layout(2, 2, schedule, *still))
    step = open_step(config, torch.float64)
    part = part_of(step.world)
    seen = []
    for number in range(1, 5):
        result = step.run(number, part, learning_rate=0.0)
        gradients = [piece[-1].clone() for piece in step.optimizer.gradient_pieces()]
        seen.append((result, gradients))
    first, *others = seen
    return all(
        (result.loss, result.grad_norm) == (first[0].loss, first[0].grad_norm)
        and torch.equal(result.record.max_logits, first[0].record.max_logits)
        and all(map(torch.equal, gradients, first[1]))
        for result, gradients in others
    )


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "k2"])
def test_the_last_step_has_the_bits_of_the_first(schedule: str) -> None:
    """Catches a first step that runs data to learn shapes, and sums in the order of arrival."""
    assert run_ranks(4, repeat_a_step, schedule) == [True] * 4


# --- bf16 -----------------------------------------------------------------------------------

MICROBATCHES = 64


def _rows(first: int, count: int) -> Batch:
    """Rows of equally many labels, so that one alone weighs a power of two of its share."""
    rng = np.random.default_rng(5)
    windows = rng.integers(0, 257, (MICROBATCHES, LENGTH + 1))[first : first + count]
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), None)


def _gradients(step: TrainStep, rows: Batch) -> dict[str, torch.Tensor]:
    step._accumulate(rows, lambda: False).combined()
    step.optimizer.buffers.reduced()
    return {n: g.double() for n, g in step.model.hf_named_gradients()}


def accumulate_as_rank(rank: int, world_size: int) -> list[dict[str, float]]:
    """Squared norms of this rank's gradients and of what they differ by, a tensor each."""
    config = configuration(1, 1, *layout(2, 1, "k2"))
    world = open_world(config.parallel)

    def opened(precision: torch.dtype, microbatches: int) -> TrainStep:
        schedule = replace(config.schedule, global_batch_size=microbatches)
        return open_step(replace(config, schedule=schedule), precision, world)

    many, one = opened(torch.bfloat16, MICROBATCHES), opened(torch.bfloat16, 1)
    exact = opened(torch.float32, MICROBATCHES)
    narrow = dict(many.model.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.model.named_parameters():
            parameter.copy_(narrow[name])
    accumulated = _gradients(many, _rows(0, MICROBATCHES))
    wide = _gradients(exact, _rows(0, MICROBATCHES))
    summed = {n: torch.zeros_like(g) for n, g in accumulated.items()}
    rounded = {n: torch.zeros_like(g, dtype=torch.bfloat16) for n, g in accumulated.items()}
    for number in range(MICROBATCHES):
        for n, gradient in _gradients(one, _rows(number, 1)).items():
            summed[n] += gradient / MICROBATCHES
            rounded[n] += (gradient / MICROBATCHES).to(torch.bfloat16)
    return [
        {
            "norm": float(wide[n].square().sum()),
            "accumulation": float((accumulated[n] - summed[n]).square().sum()),
            "bf16 sum": float((rounded[n].double() - summed[n]).square().sum()),
            "ours": float((accumulated[n] - wide[n]).square().sum()),
            "best": float((summed[n] - wide[n]).square().sum()),
        }
        for n in accumulated
    ]


def test_64_bf16_microbatches_are_summed_in_fp32() -> None:
    """Catches gradients that are summed in bf16, in any tensor: what 64 microbatches add up to
    differs from the exact sum of the same gradients by less than a thousandth of the gradient
    of an fp32 model, and is no further from that gradient."""
    tensors = [tensor for rank in run_ranks(2, accumulate_as_rank, timeout=240) for tensor in rank]
    assert len(tensors) > 100
    for tensor in tensors:
        assert tensor["accumulation"] <= (1e-3) ** 2 * tensor["norm"]
    total = {key: sum(tensor[key] for tensor in tensors) ** 0.5 for key in tensors[0]}
    assert total["accumulation"] < 1e-5 * total["norm"]
    assert abs(total["ours"] - total["best"]) < 1e-5 * total["norm"]
    assert total["bf16 sum"] > 1e-3 * total["norm"]  # what the test would catch


# --- a rank is lost -------------------------------------------------------------------------

SECONDS = 6


def lose_rank_2(rank: int, world_size: int, hangs: bool) -> tuple[str, float]:
    """Rank 2 dies or hangs in its third forward; what the others raise, after how many seconds."""
    config = configuration(1, 1, *layout(4, 1, "1f1b", f"parallel.timeout_seconds={SECONDS}"))
    step = open_step(config, torch.float64)
    calls, attend = [], Layer.attend

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            time.sleep(2 * SECONDS + 1 if hangs else 0)
            os._exit(1)
        return attend(*arguments)

    if rank == 2:
        Layer.attend = dying  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        step.run(1, part_of(step.world), RATE)
    except PeerError as error:
        return str(error), time.perf_counter() - started
    return "done", 0.0


@pytest.mark.parametrize("hangs", [False, True])
def test_a_rank_lost_in_the_middle_of_a_step_is_named_with_what_others_did(hangs: bool) -> None:
    """Catches ranks that wait for ever, and an end that does not say for whom and in what."""
    told = run_ranks(4, lose_rank_2, hangs, lost=(2,), timeout=60)
    assert told[2] is None
    for rank in (0, 1, 3):
        message, seconds = told[rank]
        assert seconds < 2 * SECONDS, (rank, seconds)
        talked = re.search(r"(?:send to|receive from) rank (\d)", message)
        assert talked is not None, message
        assert abs(int(talked[1]) - rank) == 1, message
        where = rf"\(rank {rank} was in {rank}[A-Z_]+\d+, action \d+ of the step\)$"
        assert re.search(where, message), message


# --- forwards alone -------------------------------------------------------------------------


def look_as_rank(
    rank: int, world_size: int, pp: int, vpp: int, dp: int, ep: int, schedule: str = "k2"
) -> tuple[float, dict[str, float], torch.Tensor, list[int]]:
    """Held-out loss, by domain, exact maxima of logits, and a sample, after one step."""
    more = ("model.num_hidden_layers=5", "optimizer.qk_clip_threshold=0.001")
    config = configuration(dp, ep, *layout(pp, vpp, schedule, *more))
    step = open_step(config, torch.float64)
    world = step.world
    step.run(1, part_of(world), RATE)
    forward = ForwardPipeline(
        step.model, step.dispatcher, world.pp, step.executor.schedule.placement
    )
    rows = batch()
    assert rows.document_ids is not None
    heldout = [  # of unequal sizes, and no multiple of the replicas
        (domain, Batch(rows.tokens[part], rows.labels[part], rows.document_ids[part]))
        for domain, part in (("web", slice(0, 4)), ("web", slice(4, 6)), ("code", slice(6, 9)))
    ]
    lengths = np.arange(257) % 4 + 1
    found = evaluate(forward, heldout, lengths, 0.001, world.dp, world.everyone)
    ids = generate(
        forward,
        rows.tokens[0, :5].tolist(),
        12,
        context=LENGTH,
        vocabulary=257,
        ranks=world.everyone,
        speaks=world.dp.index == 0,
    )
    losses = {**found.domain_losses, "bits": found.bits_per_byte}
    return found.loss, losses, found.max_logits, ids


@pytest.mark.parametrize("schedule", ["k2", "dualpipe_v"])
def test_held_out_loss_and_samples_do_not_depend_on_the_layout(schedule: str) -> None:
    """Catches a batch that two replicas count, a stage without the last update, stages looked
    for where another schedule would place them, and ranks that continue a sample with ids of
    their own."""
    ((loss, losses, logits, ids),) = run_ranks(1, look_as_rank, 1, 1, 1, 1)
    assert len(ids) == 12
    for ours in run_ranks(4, look_as_rank, 2, 2, 2, 2, schedule):
        assert ours[0] == pytest.approx(loss, rel=1e-9)
        assert ours[1] == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(ours[2], logits, rtol=1e-9, atol=0.0)
        assert ours[3] == ids
