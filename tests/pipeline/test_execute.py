"""One rank's row of a schedule run on real chunks, alone or with peers that stand in."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import kimi_pretrain.pipeline.execute as executing
from kimi_pretrain.activation.offload import Offloader
from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.config.activation import TAGS, policies
from kimi_pretrain.config.schema import ActivationConfig
from kimi_pretrain.model.layer import Layer
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import (
    Arrived,
    Dispatcher,
    DispatchPlan,
    Flight,
    LocalDispatcher,
    Route,
    Rows,
)
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.pipeline.actions import Action, Kind, Schedule, leaves
from kimi_pretrain.pipeline.execute import Executor, Work
from kimi_pretrain.pipeline.passes import (
    insert_offload,
    insert_p2p,
    insert_recompute,
    limit_weight_grad,
    split_weight_grad,
)
from kimi_pretrain.pipeline.schedules import generate
from kimi_pretrain.pipeline.timeline import COPY
from tests.pipeline import handmade
from tests.pipeline.one_rank import (
    LENGTHS,
    Operation,
    StandIn,
    batches,
    chunks,
    labels_in,
    plain,
    record,
    tiny,
)

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("zb_h1", 1),
    ("k2", 1),
    ("interleaved_1f1b", 2),
    ("k2", 2),
    ("k2", 4),
    ("dualpipe_v", 2),
]
CONFIG = tiny()


def alone(name: str, vpp: int) -> Schedule:
    """The schedule of a pipeline of one rank."""
    return insert_p2p(generate(name, 1, vpp, len(LENGTHS)))


def execute(
    schedule: Schedule,
    dispatcher: Dispatcher | None = None,
    group: StandIn | None = None,
    observe: Callable[..., None] | None = None,
    config: Any = CONFIG,
    prepare: Callable[[RankModel], None] = lambda model: None,
    activations: Activations | None = None,
) -> tuple[Any, Tensor, Any]:
    """The rank's model after its part of a step, the losses' sum, and what was observed."""
    dispatcher, group = dispatcher or LocalDispatcher(), group or StandIn()
    mine = tuple(s for s in range(schedule.stages) if schedule.placement[s] == group.index)
    model = chunks(config, schedule.stages, mine, dispatcher)
    prepare(model)
    rows, losses = batches(config)[: schedule.microbatches], []
    seen = record(config, len(rows))
    group_ = cast(Group, group)
    executor = Executor(schedule, model, dispatcher, group_, observe, activations)
    executor.run(Work(rows, seen, labels_in(rows), lambda loss: losses.append(loss.clone())))
    (loss,) = losses
    return model, loss, seen


@pytest.mark.parametrize(("name", "vpp"), SCHEDULES)
def test_any_schedule_computes_what_one_graph_does(name: str, vpp: int) -> None:
    """Catches a microbatch's tensors given to another, weight gradients lost or added twice, and
    main gradients that have become part of a forward's graph."""
    model, loss, seen = execute(alone(name, vpp))
    want, wanted_loss, wanted = plain(CONFIG, batches(CONFIG))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=0.0)
    gradients = {n: p.grad for n, p in want.named_parameters()}
    assert {n for n, _ in model.named_parameters()} == gradients.keys()
    for n, parameter in model.named_parameters():
        assert not parameter.main_grad.requires_grad, n
        assert parameter.grad is None, n
        scale = float(gradients[n].abs().max())
        torch.testing.assert_close(
            parameter.main_grad, gradients[n], rtol=0.0, atol=1e-9 * scale, msg=n
        )
    assert torch.equal(seen.expert_counts, wanted.expert_counts)
    torch.testing.assert_close(seen.max_logits, wanted.max_logits, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(seen.aux_loss, wanted.aux_loss, rtol=1e-9, atol=0.0)
    assert seen.tokens == wanted.tokens


# What can be computed again is, the rest leaves for the host.
AGAIN_OR_AWAY = {
    tag: "recompute" if "recompute" in allowed else "offload" for tag, allowed in TAGS.items()
}


@pytest.mark.parametrize("most", [1, 0])
def test_weight_gradients_that_wait_less_add_up_to_the_same(most: int) -> None:
    """Catches one that is lost or added twice where it was moved ahead, or made whole again."""
    whole = limit_weight_grad(generate("k2", 1, 2, len(LENGTHS)), 0)
    late = split_weight_grad(whole, delay=[3])
    limited = limit_weight_grad(late, most)
    assert limited != late
    model, loss, _ = execute(insert_p2p(limited))
    want, wanted_loss, _ = execute(insert_p2p(late))
    assert torch.equal(loss, wanted_loss)
    for (n, mine), (_, other) in zip(
        model.named_parameters(), want.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.main_grad, other.main_grad, rtol=1e-12, atol=1e-15, msg=n)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("name", "vpp"), SCHEDULES)
def test_activations_that_were_away_give_the_same_bits(name: str, vpp: int, ahead: bool) -> None:
    """Catches what is computed again from another microbatch, and what is still on the host."""
    plain_model, want, _ = execute(alone(name, vpp))
    schedule = insert_offload(alone(name, vpp))
    schedule = insert_recompute(schedule) if ahead else schedule
    offloader = Offloader(torch.device("cpu"), 2**24)
    chosen = policies(ActivationConfig("custom", AGAIN_OR_AWAY))
    seen: list[tuple[str, str]] = []

    def observe(node: str, resource: str, name: str, start: float, end: float) -> None:
        seen.append((resource, name))

    model, loss, _ = execute(schedule, observe=observe, activations=Activations(chosen, offloader))
    assert torch.equal(loss, want)
    expected = dict(plain_model.named_parameters())
    for n, parameter in model.named_parameters():
        assert torch.equal(parameter.main_grad, expected[n].main_grad), n
    kinds = [leaf.kind for row in schedule.ranks for node in row for leaf in leaves(node)]
    assert offloader.moved.out > 0 or Kind.OFFLOAD not in kinds
    assert offloader.slab.spans.used == 0
    copies = [name for resource, name in seen if resource == COPY]
    again = [name for _, name in seen if name.endswith(" again")]
    assert len(copies) >= kinds.count(Kind.PREFETCH)
    assert len(again) == kinds.count(Kind.RECOMPUTE)


@pytest.mark.parametrize(("name", "vpp"), SCHEDULES)
def test_nothing_is_computed_twice(name: str, vpp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a forward that is run again to learn a shape, and products of weights of which
    some microbatch has none or two."""
    phases: Counter[tuple[int, str]] = Counter()

    def counting(phase: str) -> None:
        original = getattr(Layer, phase)

        def counted(layer: Layer, *arguments: Any) -> Any:
            phases[layer.index, phase] += 1
            return original(layer, *arguments)

        monkeypatch.setattr(Layer, phase, counted)

    for phase in ("attend", "expert", "combine", "dense"):
        counting(phase)
    delivered: Counter[str] = Counter()

    def count_deliveries(model: RankModel) -> None:
        for n, parameter in model.named_parameters():
            parameter.main_grad_ready = lambda n=n: delivered.update([n])  # type: ignore[attr-defined]

    compute = executing._compute

    def computed(products: executing.Products) -> None:
        put_off.append(len(products))
        compute(products)

    put_off: list[int] = []
    monkeypatch.setattr(executing, "_compute", computed)
    model, _, _ = execute(alone(name, vpp), prepare=count_deliveries)
    moe = ("attend", "expert", "combine")
    layers = {(0, "attend"), (0, "dense"), *((i, phase) for i in (1, 2, 3) for phase in moe)}
    assert phases == dict.fromkeys(layers, len(LENGTHS))
    parameters = dict(model.named_parameters())
    assert delivered == dict.fromkeys(parameters, len(LENGTHS))
    # The embedding and the fused head and loss add their gradients themselves.
    matrices = [
        n
        for n, parameter in parameters.items()
        if parameter.dim() >= 2 and "embed_tokens" not in n and "lm_head" not in n
    ]
    assert sum(put_off) == len(matrices) * len(LENGTHS)


def _cut(schedule: Schedule, node: str) -> Schedule:
    row = tuple(n for n in schedule.ranks[0] if str(n) != node)
    assert len(row) == len(schedule.ranks[0]) - 1
    return replace(schedule, ranks=(row,))


@pytest.mark.parametrize(
    ("name", "vpp", "node", "left"),
    [
        ("zb_h1", 1, "0W1", r"weights \[\(0, 1\)\], tapes \[\]"),
        ("1f1b", 1, "0B2", r"weights \[\], tapes \[\(0, 2\)\]"),
        ("k2", 2, "0I2", "nobody took"),
    ],
)
def test_what_a_step_leaves_is_an_error(name: str, vpp: int, node: str, left: str) -> None:
    """Catches a weight gradient of a microbatch that is silently missing from the sum."""
    row = _cut(alone(name, vpp), node)
    if node == "0I2":
        row = _cut(row, "0W2")
    with pytest.raises(RuntimeError, match=left):
        execute(row)


# --- order ----------------------------------------------------------------------------------


class Noting(LocalDispatcher):
    """Notes when rows leave and when they are awaited, as all-to-alls that take time do.

    With weights that travel, the four ways of a pair are told apart.
    """

    def __init__(self, log: list[str]) -> None:
        super().__init__(weights_at_experts=True)
        self.log = log

    def _flight(self, name: str, plain: Flight[Any]) -> Flight[Any]:
        self.log.append(f"start {name}")
        return Flight([Operation(self.log, name)], plain.wait)

    def dispatch(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Flight[Arrived]:
        return self._flight("f.dispatch", super().dispatch(rows, weights, plan))

    def send(self, rows: Tensor, route: Route) -> Flight[Tensor]:
        return self._flight("b.combine", super().send(rows, route))

    def send_back(self, rows: Tensor, weights: Tensor | None, route: Route) -> Flight[Rows]:
        name = "f.combine" if weights is None else "b.dispatch"
        return self._flight(name, super().send_back(rows, weights, route))


def events(
    schedule: Schedule, group: StandIn | None = None, config: Any = CONFIG
) -> tuple[list[str], list[tuple[str, str]]]:
    """What happened, in order; and the names of all-to-alls and messages that were told."""
    group = group or StandIn()
    flown: list[tuple[str, str]] = []

    def observe(node: str, resource: str, name: str, start: float, end: float) -> None:
        assert start <= end
        if resource == "compute":
            group.log.append(name)
        else:
            flown.append((node, name))

    execute(schedule, Noting(group.log), group, observe, config)
    return group.log, flown


def pair(whole: bool) -> Schedule:
    """0F0, the forward of microbatch 1 with the backward of 0, and the rest."""
    if whole:
        return handmade.one_f_one_b(1, 1, 2, paired=True)
    return generate("k2", 1, 1, 2)


ONE_MOE_LAYER = tiny(num_hidden_layers=1, first_k_dense_replace=0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_pair_computes_one_microbatch_while_the_others_rows_fly(whole: bool) -> None:
    """Catches an order other than the reference's, an all-to-all that is awaited before the
    other microbatch has computed, and weight gradients that delay a flight."""
    log, _ = events(pair(whole), config=ONE_MOE_LAYER)
    b, f = ("0B0" if whole else "0I0"), "0F1"
    first = log.index(f"{b} head")
    expected = [
        f"{b} head",
        f"{b} combine",
        "start b.combine",
        f"{f} embedding",
        f"{f} attend",
        "start f.dispatch",
        "await b.combine",
        f"{b} expert",
        "start b.dispatch",
        *([f"{b} expert.W"] if whole else []),
        "await f.dispatch",
        f"{f} expert",
        "start f.combine",
        "await b.dispatch",
        f"{b} attend",
        f"{b} embedding",
        "await f.combine",
        f"{f} combine",
        f"{f} head",
        f"{b} attend.W" if whole else "0W0 weight",
    ]
    assert log[first : first + len(expected)] == expected


def test_every_flight_of_a_deep_pair_has_the_others_compute_under_it() -> None:
    """Catches layers after the first of a chunk that no longer alternate."""
    config = tiny(num_hidden_layers=3, first_k_dense_replace=0)
    log, _ = events(pair(whole=False), config=config)
    inside = log[log.index("0I0 head") : log.index("0W0 weight")]
    flying = [name for name in inside if name.startswith("start ")]
    assert len(flying) == 3 * 4
    for number, event in enumerate(inside):
        if event.startswith("start "):
            name = event.removeprefix("start ")
            landed = inside.index(f"await {name}", number)
            other = "0F1 " if name.startswith("b.") else "0I0 "
            assert any(e.startswith(other) for e in inside[number:landed]), (number, name)


def last_of_two(microbatches: int, text: str) -> Schedule:
    """Rank 1 of 2 does this; nobody asks what rank 0 does."""
    row = []
    for word in text.split():
        stage, kind, number = word[0], word[1:-1], word[-1]
        row.append(Action(Kind(kind), int(stage), int(number)))
    return Schedule("by hand", 2, 1, microbatches, ((), tuple(row)), (0, 1))


def test_the_last_weight_gradients_of_a_backward_hide_its_message() -> None:
    """Catches weight gradients that are computed while the stage before waits for its gradient,
    or before this rank has said that it wants the next activation."""
    row = last_of_two(2, "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1")
    group = StandIn(index=1, size=2)
    log, flown = events(row, group, tiny(first_k_dense_replace=0))
    start = log.index("1B0 attend", log.index("start b.dispatch", log.index("1B0 attend.W")))
    assert log[start : start + 6] == [
        "1B0 attend",
        "send to 0",
        "receive from 0",
        "1B0 attend.W",
        "await receive from 0",
        "1F1 attend",
    ]
    assert log[-3:] == ["1B1 attend.W", "await send to 0", "await send to 0"]
    messages = [(node, name) for node, name in flown if "_" in name]
    assert messages == [(n, n) for n in ("1RECV_F0", "1RECV_F1", "1SEND_B0", "1SEND_B1")]


def test_a_lost_peer_is_told_with_the_action() -> None:
    """Catches a stop that leaves open which rank waited for what."""
    schedule = last_of_two(1, "1RECV_F0 1F0 1B0 1SEND_B0")
    group = StandIn(index=1, size=2, error="receive from rank 10: timed out")
    with pytest.raises(PeerError) as lost:
        execute(schedule, group=group)
    assert str(lost.value) == (
        "receive from rank 10: timed out (rank 11 was in 1F0, action 1 of the step)"
    )


def test_a_peer_lost_after_the_last_action_is_told_with_what_was_left() -> None:
    """Catches a last send that nobody takes, without a word of when."""
    schedule = last_of_two(1, "1RECV_F0 1F0 1B0 1SEND_B0")
    group = StandIn(index=1, size=2)
    group.send = lambda _, to: Operation([], "", "send to rank 10: timed out")  # type: ignore[method-assign]
    with pytest.raises(PeerError, match=r"rank 10: timed out \(while awaiting the last messages"):
        execute(schedule, group=group)


def test_what_is_told_names_phases_as_traces_do() -> None:
    """Catches an all-to-all without its action, which no figure could place."""
    log, flown = events(generate("k2", 1, 2, 3))
    names = {name for name in log if name[0].isdecimal()}
    assert {"0F0 embedding", "0I2 embedding", "1F0 head", "1I2 head", "1W1 weight"} <= names
    flights = Counter(name for _, name in flown)
    moe = {0: 1, 1: 2}
    assert flights == {
        f"{stage}{kind}{number} {way}": moe[stage]
        for stage in moe
        for kind in "FI"
        for number in range(3)
        for way in ("dispatch", "combine")
    }
    assert ("(0F1;1I0)OVERLAP_F_B", "1I0 combine") in flown


def test_an_executor_that_nobody_observes_asks_for_no_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches polling of flights in runs that are not traced."""
    monkeypatch.setattr(Operation, "done", property(lambda self: pytest.fail("asked")))
    execute(alone("k2", 1), Noting([]))
