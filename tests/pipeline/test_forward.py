"""Forwards alone, through the stages of one rank."""

from typing import cast

import pytest
import torch
from torch import Tensor

from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.layer import Layer
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import LocalDispatcher
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.pipeline.shape import looped_placement
from tests.pipeline.one_rank import FLOAT, StandIn, batches, chunks, plain, record, tiny

CONFIG = tiny()


def forward_of(stages: int, mine: tuple[int, ...], group: StandIn) -> ForwardPipeline:
    model = chunks(CONFIG, stages, mine)
    placement = looped_placement(group.size, stages // group.size)
    return ForwardPipeline(model, LocalDispatcher(), cast(Group, group), placement)


@pytest.mark.parametrize("vpp", [1, 2, 4])
def test_stages_forward_as_the_whole_model(vpp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch's documents or tables used for another, a layer that is run twice, results
    out of order, a final norm that is left out, and graphs that are kept."""
    attended: list[int] = []
    attend = Layer.attend

    def counted(layer: Layer, *arguments: object) -> object:
        attended.append(layer.index)
        return attend(layer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Layer, "attend", counted)
    forward = forward_of(vpp, tuple(range(vpp)), StandIn())
    rows = batches(CONFIG)
    found: list[tuple[int, Tensor]] = []
    seen = record(CONFIG, len(rows))
    forward.run(rows, seen, lambda number, hidden: found.append((number, hidden)))
    assert sorted(attended) == sorted([*range(4)] * len(rows))
    monkeypatch.undo()
    assert [number for number, _ in found] == list(range(len(rows)))
    model = from_config(CONFIG, dtype=FLOAT)
    for (_, hidden), batch in zip(found, rows, strict=True):
        assert not hidden.requires_grad
        want = model._hidden(batch.tokens, batch.document_ids, None)
        torch.testing.assert_close(hidden, want.detach(), rtol=1e-12, atol=1e-14)
    _, _, wanted = plain(CONFIG, rows)
    assert torch.equal(seen.expert_counts, wanted.expert_counts)
    torch.testing.assert_close(seen.max_logits, wanted.max_logits, rtol=1e-12, atol=0.0)


def test_a_rank_in_the_middle_receives_and_sends() -> None:
    """Catches a loss asked for where no head is, and activations that nobody sends on."""
    group = StandIn(index=1, size=3)
    forward = forward_of(3, (1,), group)
    assert not forward.ends_here
    assert forward_of(3, (2,), StandIn(index=2, size=3)).ends_here
    rows = batches(CONFIG)
    forward.run(rows, None, lambda number, hidden: pytest.fail("the last stage is not here"))
    kinds = [event.split()[0] for event in group.log if not event.startswith("await")]
    assert sorted(kinds) == ["receive"] * 3 + ["send"] * 3
    assert {to for to, _ in group.sent} == {2}
    assert [sent.shape[1] for _, sent in group.sent] == [b.tokens.shape[1] for b in rows]
