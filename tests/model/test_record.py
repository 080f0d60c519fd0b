"""What a step records."""

from collections.abc import Callable

import pytest
import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.ops.attention import max_logits
from tests.model import reference

TinyConfig = Callable[..., ModelConfig]


def heads(values: list[float], scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """One token a head, whose only logit is the value: q, k, lse."""
    q = torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
    return q, torch.ones_like(q), q[..., 0] * scale + 0.5  # an LSE half above the maximum


def test_only_heads_above_tau_get_the_exact_pass(tiny: TinyConfig) -> None:
    """The exact pass costs a second attention: it must not run for heads that need no clip."""
    asked: list[list[bool]] = []

    def spy(q, k, scale, documents, chosen):  # type: ignore[no-untyped-def]
        asked.append(chosen.tolist())
        return max_logits(q, k, scale, documents, chosen)

    record = StepRecord.for_model(tiny(), tau=100.0, dtype=torch.float64)
    q, k, lse = heads([99.8, 99.4, 120.0])
    record.observe_attention(1, q, k, lse, 1.0, None, spy)
    assert asked == [[True, False, True]]
    assert record.max_logits[1].tolist() == pytest.approx([99.8, 99.9, 120.0])
    assert record.exact[1].tolist() == [True, False, True]
    q, k, lse = heads([-7.0, -8.0, -9.0])
    record.observe_attention(2, q, k, lse, 1.0, None, spy)
    assert asked[1:] == [[False, False, False]]
    assert record.max_logits[2].tolist() == pytest.approx([-6.5, -7.5, -8.5])
    assert record.max_logits[0].tolist() == [-torch.inf] * 3


def test_microbatches_keep_the_larger_and_its_exactness(tiny: TinyConfig) -> None:
    """A later microbatch must not overwrite the maximum, nor call its bound exact."""
    record = StepRecord.for_model(tiny(), tau=100.0, dtype=torch.float64)
    for values in ([130.0, 90.0, 99.6], [110.0, 95.0, 99.45]):
        q, k, lse = heads(values)
        record.observe_attention(0, q, k, lse, 1.0, None)
    # Head 2: exact 99.6 from the first, a bound of 99.95 from the second.
    assert record.max_logits[0].tolist() == pytest.approx([130.0, 95.5, 99.95])
    assert record.exact[0].tolist() == [True, False, False]


def test_without_tau_no_exact_pass_and_with_exact_all(tiny: TinyConfig) -> None:
    q, k, lse = heads([500.0, -3.0, 1.0])
    record = StepRecord.for_model(tiny(), tau=None, dtype=torch.float64)
    record.observe_attention(0, q, k, lse, 1.0, None)
    assert not record.exact.any()
    record = StepRecord.for_model(tiny(), tau=None, exact=True, dtype=torch.float64)
    record.observe_attention(0, q, k, lse, 1.0, None)
    assert record.max_logits[0].tolist() == [500.0, -3.0, 1.0]
    assert record.exact[0].all()


def test_a_forward_records_counts_tokens_and_maxima(tiny: TinyConfig) -> None:
    """Two microbatches add up; layers and heads are in their places."""
    cfg = tiny()
    model = from_config(cfg, dtype=torch.float64)
    weights = dict(model.hf_named_parameters()) | dict(model.hf_named_buffers())
    tokens = torch.randint(cfg.vocab_size, (2, 2, 12))
    record = StepRecord.for_model(cfg, tau=-torch.inf, dtype=torch.float64)
    maxima = []
    for microbatch in tokens:
        model.loss(microbatch, microbatch, record=record).backward()
        maxima.append(reference.forward(weights, microbatch, cfg)[2])
    assert record.tokens == 48
    assert record.expert_counts.sum(1).tolist() == [48 * 3] * 2
    torch.testing.assert_close(record.max_logits, torch.maximum(*maxima), rtol=1e-9, atol=1e-12)
    assert record.exact.all()


def test_auxiliary_loss_is_summed_over_microbatches(tiny: TinyConfig) -> None:
    """aux_scale scales its gradient only, and 0 still reports it."""
    cfg = tiny()
    model = from_config(cfg, dtype=torch.float64)
    tokens = torch.randint(cfg.vocab_size, (3, 12))
    record = StepRecord.for_model(cfg, tau=None, aux_scale=0.0, dtype=torch.float64)
    with torch.no_grad():
        model.loss(tokens[:2], tokens[:2], record=record)
        model.loss(tokens[2:], tokens[2:], record=record)
    weights = dict(model.hf_named_parameters()) | dict(model.hf_named_buffers())
    want = sum(reference.forward(weights, part, cfg)[1] for part in (tokens[:2], tokens[2:]))
    torch.testing.assert_close(record.aux_loss.sum(), want, rtol=1e-9, atol=0)


def test_router_bias_moves_once_a_step_against_the_recorded_load(tiny: TinyConfig) -> None:
    """Each layer's own counts; the dense layer has none, so rows are shifted by it."""
    cfg = tiny()
    model = from_config(cfg)
    record = StepRecord.for_model(cfg, tau=None)
    record.expert_counts[0, 2] = 12
    record.expert_counts[1, 5] = 12
    model.update_router_bias(record, 0.01)
    for layer, expert in ((1, 2), (2, 5)):
        bias = model.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        want = torch.full((12,), 0.01)
        want[expert] = -0.01
        torch.testing.assert_close(bias, want)
