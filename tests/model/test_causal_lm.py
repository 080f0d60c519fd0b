"""The whole model against an independent one in float64: logits, loss, every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.record import StepRecord
from tests.model import reference

TOLERANCE = 1e-9
TinyConfig = Callable[..., ModelConfig]


def build(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> CausalLM:
    """A model with norms and router biases away from their initial ones and zeros."""
    model = from_config(cfg, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(
                    parameter.shape, dtype=torch.float64, generator=generator
                ).to(dtype)
        for buffer in model.buffers():
            buffer += 0.4 * torch.randn(buffer.shape, generator=generator)
    return model


def weights_of(model: CausalLM) -> dict[str, Tensor]:
    named = [*model.hf_named_parameters(), *model.hf_named_buffers()]
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in named}


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    error = (got - want).abs()
    bound = tolerance * want.abs().max()
    worst = int(error.argmax())
    assert error.max() <= bound, (
        f"{name}: element {worst}: {got.flatten()[worst]} against {want.flatten()[worst]}"
    )


def batch(cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    stream = torch.randint(cfg.vocab_size, (2, 24), generator=generator)
    documents = torch.tensor([[0] * 9 + [1] * 3 + [2] * 11, [5] * 23], dtype=torch.int32)
    labels = stream[:, 1:].clone()
    labels[0, 8] = labels[0, 11] = -100
    return stream[:, :-1], labels, documents


@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        pytest.param({}, False, id="q_lora"),
        pytest.param({"q_lora_rank": None}, True, id="full_q-documents"),
        pytest.param({"n_group": 4, "topk_group": 2}, True, id="groups-documents"),
        pytest.param({"norm_topk_prob": False, "n_shared_experts": 2}, False, id="not_normalised"),
        pytest.param({"first_k_dense_replace": 2, "aux_loss_alpha": 0.0}, False, id="two_dense"),
        pytest.param({"v_head_dim": 16, "rope_theta": 100.0}, False, id="v_as_wide_as_qk"),
    ],
)
def test_logits_loss_gradients_and_maxima_equal_the_reference(
    tiny: TinyConfig, changes: dict[str, Any], masked: bool
) -> None:
    """Any wrong formula, order of rows, mask or backward in the model shows here."""
    cfg = tiny(**changes)
    model = build(cfg)
    weights = weights_of(model)
    tokens, labels, documents = batch(cfg)
    ids = documents if masked else None

    logits, aux, maxima = reference.forward(weights, tokens, cfg, ids)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (want + 0.7 * aux).backward()

    record = StepRecord.for_model(cfg, tau=None, exact=True, aux_scale=0.7, dtype=torch.float64)
    loss = model.loss(tokens, labels, record=record, document_ids=ids)
    loss.backward()

    if not masked:
        assert_close("logits", model(tokens), logits)
    assert_close("loss", loss, want)
    assert_close("aux loss", record.aux_loss.sum(), aux)
    assert_close("maximum logits", record.max_logits, maxima)
    gradients = dict(model.hf_named_gradients())
    assert set(gradients) == {name for name, _ in model.hf_named_parameters()}
    for name, gradient in gradients.items():
        expected = weights[name].grad
        if expected is None:  # an expert that no token chose
            assert not gradient.any(), name
        else:
            assert_close(name, gradient, expected)
