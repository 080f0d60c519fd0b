"""Forward and backward of a chunk as generators that stop where communication flies.

Every phase is a small autograd graph between detached tensors. Its ``Graph`` keeps the edges
where gradients enter, neither inputs nor outputs: what backward needs of them is in ``Saved``,
and rows that have been sent are freed. A generator yields after every phase and wherever it has
started an all-to-all: there whoever drives it computes something else, of another microbatch,
and resumes it when the rows are wanted::

    forward    attend  [dispatch]  expert  [combine]   combine ...
    backward   combine [combine]   expert  [dispatch]  attend  ...

Driven straight through, the two are the forward and the backward of the same phases that
``Layer.forward`` runs under one autograd graph.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kimi_pretrain.activation.held import Held
from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.model.chunk import Chunk
from kimi_pretrain.model.layer import Layer
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.parallel.dispatch import Arrived, Dispatcher, Flight, Route


class Stop(NamedTuple):
    """Where steps stop: a phase has been computed, or its rows have begun to fly."""

    phase: str  # embedding, attend, expert, combine, head; of a flight dispatch, combine
    flight: Flight[Any] | None = None


Steps = Generator[Stop, None, Tensor]  # returns the result; computes nothing after the last stop


class _Enter(torch.autograd.Function):
    """Where a graph begins: ``inputs`` without a history, whose gradients go into ``found``.

    A leaf of autograd's own would keep its tensor until backward, needed or not; this keeps
    none. ``gate`` requires a gradient, never gets one, and makes the inputs require theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, found: list[Tensor | None], *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.found = found
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.detach() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.found.extend(grads)
        return (None, None, *[None] * len(grads))


class Graph:
    """One phase's autograd graph, from its inputs to the edges of its outputs."""

    def __init__(self, found: list[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        self._found = found
        self._edges: list[GradientEdge | None] = [
            get_gradient_edge(out) if out is not None and out.requires_grad else None
            for out in outputs
        ]

    def backward(self, *grads: Tensor | None) -> list[Tensor | None]:
        """Gradients of the inputs from those of the outputs; the graph is spent."""
        pairs = [
            (edge, grad)
            for edge, grad in zip(self._edges, grads, strict=True)
            if edge is not None and grad is not None
        ]
        torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        found = list(self._found)
        # What still waits for W holds this graph's beginning, and with it the list.
        self._found.clear()
        self._edges = []
        return found


@dataclass
class LayerTape:
    """What a layer keeps of one microbatch between its forward and its backward."""

    attend: Graph
    route: Held[Route] | None = None  # None in a dense layer, which is one graph
    expert: Graph | None = None
    combine: Graph | None = None


@dataclass
class ChunkTape:
    """What a chunk keeps of one microbatch."""

    saved: Saved
    before: Graph | None = None  # the embedding, in the first chunk
    layers: list[LayerTape] = field(default_factory=list)
    after: Graph | None = None  # the final norm, and the loss, in the last chunk


def straight(steps: Steps) -> Tensor:
    """Drive steps to their end; every flight is awaited as soon as it has begun."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: Tensor = end.value
        return result


def forward_steps(
    chunk: Chunk,
    x: Tensor,
    microbatch: Microbatch,
    dispatcher: Dispatcher,
    keep: Callable[[ChunkTape], None],
    loss: Callable[[Tensor], Tensor] | None = None,
    activations: Activations | None = None,
) -> Steps:
    """A chunk's forward of one microbatch.

    Args:
        chunk: the layers.
        x: tokens [batch, length] in the first chunk, else hidden states.
        microbatch: positions, documents, observer.
        dispatcher: to the experts.
        keep: gets the tape.
        loss: in the last chunk: of the normalised hidden states.
        activations: how what backward needs is kept; None: as it is.

    Returns:
        Hidden states [batch, length, hidden], detached; in the last chunk the loss.
    """
    saved = Saved(Activations.kept() if activations is None else activations)
    saved.constants(microbatch.cos, microbatch.sin, microbatch.document_ids)
    tape = ChunkTape(saved)
    backbone = chunk.model
    if hasattr(backbone, "embed_tokens"):
        tape.before, (x,) = _run(saved, lambda: (backbone.embed_tokens(x),))
        yield Stop("embedding")
    for layer in backbone.layers.values():
        assert isinstance(layer, Layer)
        x = yield from _layer_forward(layer, x, microbatch, dispatcher, tape)
    if loss is not None:
        tape.after, (x,) = _run(saved, lambda h: (loss(backbone.norm(h)),), x)
        yield Stop("head")
    saved.close()
    keep(tape)
    return x


def backward_steps(tape: ChunkTape, grad: Tensor, dispatcher: Dispatcher) -> Steps:
    """A chunk's backward of one microbatch; the tape is spent.

    Args:
        tape: of the forward.
        grad: of what the forward returned.
        dispatcher: to the experts.

    Returns:
        The gradient of the chunk's input; an empty tensor in the first chunk.
    """
    if tape.after is not None:
        grad = _one(tape.after.backward(grad))
        yield Stop("head")
    while tape.layers:
        grad = yield from _layer_backward(tape.layers.pop(), grad, dispatcher)
    if tape.before is not None:
        tape.before.backward(grad)
        yield Stop("embedding")
        return grad.new_empty(0)
    return grad


def _layer_forward(
    layer: Layer,
    x: Tensor,
    microbatch: Microbatch,
    dispatcher: Dispatcher,
    chunk: ChunkTape,
) -> Steps:
    saved = chunk.saved
    if layer.router is None:

        def whole(x: Tensor) -> tuple[Tensor]:
            attended = layer.attend(x, microbatch, dispatcher)
            return (layer.dense(attended.residual, attended.hidden),)

        graph, (x,) = _run(saved, whole, x)
        chunk.layers.append(LayerTape(graph))
        yield Stop("attend")
        return x

    kept: list[Any] = []

    def attend(x: Tensor) -> tuple[Tensor | None, ...]:
        attended = layer.attend(x, microbatch, dispatcher)
        routed = attended.routed
        assert routed is not None
        kept.append(routed.plan)
        return (
            attended.residual,
            attended.hidden,
            routed.rows,
            routed.sent_weights,
            routed.weights,
        )

    graph, (residual, hidden, rows, sent_weights, weights) = _run(saved, attend, x)
    tape = LayerTape(graph)
    (plan,) = kept
    yield Stop("attend")
    flight = dispatcher.dispatch(rows, sent_weights, plan)
    del rows, sent_weights, x
    yield Stop("dispatch", flight)
    arrived = flight.wait()
    sizes, route = arrived.sizes, arrived.route  # not the rows: this frame lives until they return

    def expert(
        residual: Tensor, hidden: Tensor, rows: Tensor, own: Tensor | None
    ) -> tuple[Tensor, ...]:
        return layer.expert(residual, hidden, Arrived(rows, sizes, own, route))

    tape.route = Held(route, "route", saved)
    tape.expert, (residual, rows) = _run(
        saved, expert, residual, hidden, arrived.rows, arrived.weights
    )
    del arrived, hidden
    yield Stop("expert")
    back = dispatcher.send_back(rows, None, route)
    del rows
    yield Stop("combine", back)
    (returned, _) = back.wait()
    tape.combine, (x,) = _run(
        saved,
        lambda residual, rows, weights: (layer.combine(residual, rows, weights, plan, dispatcher),),
        residual,
        returned,
        weights,
    )
    chunk.layers.append(tape)
    yield Stop("combine")
    return x


def _layer_backward(tape: LayerTape, grad: Tensor, dispatcher: Dispatcher) -> Steps:
    if tape.route is None:
        grad = _one(tape.attend.backward(grad))
        yield Stop("attend")
        return grad
    assert tape.combine is not None
    assert tape.expert is not None
    route = tape.route.load()
    residual, rows, weights = tape.combine.backward(grad)
    assert rows is not None
    yield Stop("combine")
    there = dispatcher.send(rows, route)
    del rows
    yield Stop("combine", there)
    residual, hidden, rows, own = tape.expert.backward(residual, there.wait())
    assert rows is not None
    yield Stop("expert")
    back = dispatcher.send_back(rows, own, route)
    del rows
    yield Stop("dispatch", back)
    returned, sent_weights = back.wait()
    grad = _one(tape.attend.backward(residual, hidden, returned, sent_weights, weights))
    yield Stop("attend")
    return grad


def _run(
    saved: Saved,
    phase: Callable[..., tuple[Tensor | None, ...]],
    *inputs: Tensor | None,
) -> tuple[Graph, tuple[Any, ...]]:
    """A phase on inputs without a history: its graph, and its outputs detached."""
    found: list[Tensor | None] = []
    with torch.enable_grad(), saved.watching():
        if inputs:
            gate = torch.empty(0, requires_grad=True)
            inputs = _Enter.apply(gate, found, *inputs)  # type: ignore[no-untyped-call]
        outputs = phase(*inputs)
    graph = Graph(found, outputs)
    return graph, tuple(None if out is None else out.detach() for out in outputs)


def _one(grads: list[Tensor | None]) -> Tensor:
    (grad,) = grads
    assert grad is not None
    return grad
