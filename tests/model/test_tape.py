"""A chunk run phase by phase between detached tensors, against one autograd graph."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.config.activation import policies
from kimi_pretrain.config.schema import ActivationConfig, ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.tape import (
    ChunkTape,
    Steps,
    _run,
    backward_steps,
    forward_steps,
    straight,
)
from kimi_pretrain.parallel.dispatch import Arrived, DispatchPlan, Flight, LocalDispatcher

TinyConfig = Callable[..., ModelConfig]
LENGTH = 9


def _microbatch(model: CausalLM) -> Microbatch:
    record = StepRecord.for_model(model.config, tau=1.0, aux_scale=1.0, dtype=torch.float64)
    dtype = model.lm_head.weight.dtype
    return Microbatch.build(model.config, LENGTH, dtype, torch.device("cpu"), None, record)


def _loss(model: CausalLM, labels: Tensor) -> Callable[[Tensor], Tensor]:
    def of(hidden: Tensor) -> Tensor:
        loss: Tensor = model.lm_head(hidden.flatten(0, 1), labels.flatten())
        return loss

    return of


@pytest.mark.parametrize("weights_at_experts", [False, True])
def test_phases_between_detached_tensors_equal_one_graph(
    tiny: TinyConfig, weights_at_experts: bool
) -> None:
    """A phase that reaches around its boundary loses its gradient here."""
    dispatcher = LocalDispatcher(weights_at_experts)
    model = from_config(tiny(), dtype=torch.float64, dispatcher=dispatcher)
    torch.manual_seed(0)
    tokens, labels = torch.randint(model.config.vocab_size, (2, 2, LENGTH))
    record = StepRecord.for_model(model.config, tau=1.0, aux_scale=1.0, dtype=torch.float64)
    plain = model.loss(tokens, labels, record=record)
    plain.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    tapes: list[ChunkTape] = []
    steps = forward_steps(
        model, tokens, _microbatch(model), dispatcher, tapes.append, _loss(model, labels)
    )
    loss = straight(steps)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-12, atol=0.0)
    straight(backward_steps(tapes[0], torch.ones_like(loss), dispatcher))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-9, atol=1e-13)


class Watching(LocalDispatcher):
    """Tells which rows are still alive once they have been sent, and have arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[weakref.ref[Tensor]] = []
        self.arrived: list[StorageWeakRef] = []

    def dispatch(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Flight[Arrived]:
        self.sent.append(weakref.ref(rows))
        copy = rows.clone()  # as an all-to-all's output is
        self.arrived.append(StorageWeakRef(copy.untyped_storage()))  # type: ignore[no-untyped-call]
        return super().dispatch(copy, weights, plan)

    def send_back(self, rows: Tensor, weights: Tensor | None, route: Any) -> Any:
        self.sent.append(weakref.ref(rows))
        return super().send_back(rows.clone(), weights, route)


def test_rows_are_freed_when_they_have_been_sent(tiny: TinyConfig) -> None:
    """Catches a tape that keeps every all-to-all's input until backward."""
    dispatcher = Watching()
    model = from_config(tiny(), dtype=torch.float64, dispatcher=dispatcher)
    tokens = torch.randint(model.config.vocab_size, (1, LENGTH))
    tapes: list[ChunkTape] = []
    straight(
        forward_steps(
            model, tokens, _microbatch(model), dispatcher, tapes.append, _loss(model, tokens)
        )
    )
    gc.collect()
    assert len(dispatcher.sent) >= 2
    assert all(reference() is None for reference in dispatcher.sent)


def test_rows_stored_as_fp8_are_freed_before_their_results_fly(tiny: TinyConfig) -> None:
    """Catches a view of what arrived, be it of no rows: it keeps all of them beside their FP8."""
    dispatcher = Watching()
    model = from_config(tiny(), dtype=torch.float32, dispatcher=dispatcher)
    tokens = torch.randint(model.config.vocab_size, (1, LENGTH))
    activations = Activations(policies(ActivationConfig("custom", {"expert_up_in": "fp8"})))
    steps = forward_steps(
        model,
        tokens,
        _microbatch(model),
        dispatcher,
        lambda tape: None,
        _loss(model, tokens),
        activations,
    )
    flying = 0
    for stop in steps:
        if stop.phase == "combine" and stop.flight is not None:
            flying += 1
            assert len(dispatcher.arrived) == flying
            assert dispatcher.arrived[-1].expired()  # type: ignore[no-untyped-call]
    assert flying > 0


def _flights(steps: Steps) -> list[str]:
    return [stop.phase for stop in steps if stop.flight is not None]


def test_a_moe_layer_stops_twice_each_way(tiny: TinyConfig) -> None:
    """Catches an all-to-all that is awaited inside a phase, which nothing could hide."""
    dispatcher = LocalDispatcher()
    model = from_config(tiny(), dtype=torch.float64, dispatcher=dispatcher)
    tokens = torch.randint(model.config.vocab_size, (1, LENGTH))
    tapes: list[ChunkTape] = []
    moe = model.config.num_hidden_layers - model.config.first_k_dense_replace
    steps = forward_steps(
        model, tokens, _microbatch(model), dispatcher, tapes.append, _loss(model, tokens)
    )
    assert _flights(steps) == ["dispatch", "combine"] * moe
    backward = backward_steps(tapes[0], torch.ones((), dtype=torch.float64), dispatcher)
    assert _flights(backward) == ["combine", "dispatch"] * moe
    assert tapes[0].layers == []


def test_a_spent_graph_lets_its_gradients_go() -> None:
    """Catches a layer's gradients that stay, 0.5 GB of K2's, as long as its weights wait for W."""
    x = torch.randn(3, 4)
    graph, _ = _run(Saved(Activations.kept()), lambda x: (x * 2.0,), x)
    kept = graph._found  # as what a deferred product saved does, through the graph's beginning
    (grad,) = graph.backward(torch.ones(3, 4))
    assert torch.equal(grad, torch.full((3, 4), 2.0))  # type: ignore[arg-type]
    assert kept == []
