"""One step: gradients do not depend on the cut into microbatches; a bad step changes nothing."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch

from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.data.batches import Batch
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.train.evaluate import evaluate
from kimi_pretrain.train.generate import generate
from kimi_pretrain.train.guards import GuardStop
from kimi_pretrain.train.step import TrainStep
from tests.distributed.setting import open_step

LENGTH = 32
ALONE = Group("alone")


def _config(*overrides: str) -> Config:
    return compose(
        [
            "experiment=smoke",
            "precision=fp64",
            "run_dir=unused",
            "model.n_routed_experts=8",
            *overrides,
        ]
    )


def _step(config: Config, dtype: torch.dtype = torch.float64) -> TrainStep:
    return open_step(config, dtype)


def _forward(model: CausalLM) -> ForwardPipeline:
    return ForwardPipeline(RankModel(model.config, {0: model}), LocalDispatcher(), ALONE)


def _batch(rows: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 257, (rows, LENGTH + 1))
    labels = windows[:, 1:].copy()
    labels[0, 5:9] = -100  # labels per row differ: a mean of means would not be the mean
    documents = np.zeros((rows, LENGTH), np.int32)
    documents[:, LENGTH // 2 :] = 1
    return Batch(windows[:, :-1].copy(), labels, documents)


@pytest.mark.parametrize(
    ("part", "doing"),
    [
        ("optimizer.buffers.reduced", "reducing the gradients of step 12"),
        ("optimizer.norm", "adding up the gradient norm of step 12"),
        ("optimizer.step", "updating the weights in step 12"),
    ],
)
def test_a_lost_peer_is_told_with_what_was_going_on(
    part: str, doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches "rank 3 did not answer" without a word of what for, after the last action."""

    def lost(*_: object) -> None:
        raise PeerError("rank 3 did not answer", shared=True)

    step = _step(_config("schedule.global_batch_size=4"))
    holder, name = attrgetter(part.rpartition(".")[0])(step), part.rpartition(".")[2]
    monkeypatch.setattr(holder, name, lost)
    with pytest.raises(PeerError) as told:
        step.run(12, _batch(), 1e-3)
    assert str(told.value) == f"rank 3 did not answer (while {doing})"
    assert told.value.shared


def test_a_stop_asked_for_within_a_step_ends_after_it() -> None:
    """Catches ranks that take another whole step after the one a signal came in."""
    step = _step(_config("schedule.micro_batch_size=1"))
    asked: list[int] = []
    run = step.model.chunks[0].lm_head.forward

    def interrupted(*arguments: Any) -> torch.Tensor:
        asked.append(1)
        result: torch.Tensor = run(*arguments)
        return result

    step.model.chunks[0].lm_head.forward = interrupted  # type: ignore[method-assign]
    assert step.run(1, _batch(), 1e-2, lambda: bool(asked)).stop
    assert not step.run(2, _batch(), 1e-2).stop


def test_the_cut_into_microbatches_does_not_matter() -> None:
    """Catches a loss averaged by microbatch, an auxiliary loss scaled by their number, expert
    counts or maxima of the last microbatch only, and a denominator by microbatch."""
    results, steps = [], []
    for size in (4, 2, 1):
        step = _step(_config(f"schedule.micro_batch_size={size}", "optimizer.grad_clip=null"))
        for number in (1, 2):
            results.append(step.run(number, _batch(), 1e-2))
        steps.append(step)
    whole = steps[0]
    for step, result in zip(steps[1:], (results[3], results[5]), strict=True):
        assert result.loss == pytest.approx(results[1].loss, rel=1e-12)
        assert torch.equal(result.record.expert_counts, results[1].record.expert_counts)
        assert torch.allclose(result.record.max_logits, results[1].record.max_logits, rtol=1e-9)
        for (name, ours), (_, theirs) in zip(
            step.model.hf_named_parameters(), whole.model.hf_named_parameters(), strict=True
        ):
            scale = float(theirs.abs().max())
            assert float((ours - theirs).abs().max()) <= 1e-9 * scale, name
        for (name, ours), (_, theirs) in zip(
            step.model.hf_named_gradients(), whole.model.hf_named_gradients(), strict=True
        ):
            scale = float(theirs.abs().max()) or 1.0
            assert float((ours - theirs).abs().max()) <= 1e-9 * scale, name


def test_a_step_that_is_not_finite_leaves_every_bit_and_names_the_parameter() -> None:
    """Catches a guard that looks after the update, after the momentum or after the bias."""
    step = _step(_config(), torch.float32)
    step.run(1, _batch(), 1e-2)
    with torch.no_grad():
        step.model.chunks[0].get_parameter("lm_head.weight")[7, 3] = float("nan")
    before = {k: v.clone() for k, v in step.model.chunks[0].state_dict().items()}
    state = [piece.values.clone() for piece in step.optimizer.pieces()]
    with pytest.raises(GuardStop, match=r"step 2: loss nan.*model\."):
        step.run(2, _batch(), 1e-2)
    for key, value in step.model.chunks[0].state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0)), key
    for now, then in zip((p.values for p in step.optimizer.pieces()), state, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
    assert step.optimizer.steps == 1


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_an_infinity_in_fp8_stops_the_step_and_is_named(kernels: str) -> None:
    """Catches storage that clips an infinity to 448, a mark that nobody reports, and one of the
    step before that is told again."""
    step = _step(_config("precision=bf16", "activation=k2", f"kernels={kernels}"), torch.bfloat16)
    marked = step.executor.activations.marked_by_tag
    step.run(1, _batch(), 1e-2)
    assert marked() == {}
    stack = step.model.chunks[0].get_parameter("model.layers.2.mlp.experts.gate_up_proj")
    kept = stack.detach().clone()
    with torch.no_grad():
        stack[3, 1, 5] = torch.inf  # row 5 of the fourth expert's up-projection
    with pytest.raises(GuardStop, match=r"FP8 tiles with a NaN or an infinity in .*swiglu_in \(\d"):
        step.run(2, _batch(), 1e-2)
    assert marked()["swiglu_in"] > 0
    with torch.no_grad():
        stack.copy_(kept)
    step.run(2, _batch(), 1e-2)
    assert marked() == {}


def test_held_out_loss_is_the_mean_over_labels_and_bits_count_bytes() -> None:
    """Catches a mean over batches of unequal size, and bits a token reported as bits a byte."""
    config = _config()
    model = from_config(config.model, dtype=torch.float64)
    whole = _batch(3)
    parts = [("a", part) for part in whole.split(2)]
    lengths = np.full(257, 2)
    once = evaluate(_forward(model), [("a", whole)], lengths, None, ALONE, ALONE)
    cut = evaluate(_forward(model), parts, lengths, None, ALONE, ALONE)
    tokens, labels = (torch.from_numpy(x) for x in (whole.tokens, whole.labels))
    ids = torch.from_numpy(whole.document_ids)
    expected = model.loss(tokens, labels, document_ids=ids).item()
    assert once.loss == pytest.approx(expected, rel=1e-12)
    assert cut.loss == pytest.approx(expected, rel=1e-12)
    assert cut.bits_per_byte == pytest.approx(expected / np.log(2) / 2, rel=1e-12)
    assert bool(torch.isfinite(cut.max_logits).all())


def test_a_sample_uses_only_ids_that_have_text_and_leaves_the_random_state() -> None:
    """Catches a sample of an id the tokenizer cannot decode, which ended a finished run."""
    config = _config()
    model = from_config(replace(config.model, vocab_size=600), dtype=torch.float32)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    settings = {"context": 16, "vocabulary": 10, "top_k": 40, "ranks": ALONE}
    ids = generate(_forward(model), [1, 2, 3], 40, **settings)
    assert len(ids) == 40
    assert max(ids) < 10
    assert torch.equal(torch.rand(1), expected)
    assert ids == generate(_forward(model), [1, 2, 3], 40, **settings)
