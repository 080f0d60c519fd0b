"""Spans of host memory: none overlaps, none is lost."""

import random
from itertools import pairwise

import pytest
import torch

from kimi_pretrain.activation.slab import ALIGNMENT, Slab, Span, Spans, needed


def test_spans_never_overlap_and_all_come_back() -> None:
    """Catches neighbours that are joined wrongly, after any order of taking and giving back."""
    rng = random.Random(0)
    spans = Spans(64 * ALIGNMENT)
    taken: list[Span] = []
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            spans.give_back(taken.pop(rng.randrange(len(taken))))
        elif (span := spans.take(rng.randrange(1, 9 * ALIGNMENT))) is not None:
            taken.append(span)
        ends = sorted((span.start, span.start + span.size) for span in taken)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert spans.used == sum(span.size for span in taken)
    for span in taken:
        spans.give_back(span)
    assert spans.take(64 * ALIGNMENT) == Span(0, 64 * ALIGNMENT)
    assert spans.take(1) is None


def test_nothing_is_given_back_twice() -> None:
    """Catches memory that two tensors get."""
    spans = Spans(4 * ALIGNMENT)
    first, _ = spans.take(ALIGNMENT), spans.take(ALIGNMENT)
    assert first is not None
    spans.give_back(first)
    with pytest.raises(ValueError, match="given back twice"):
        spans.give_back(first)


def test_views_lie_one_after_the_other() -> None:
    """Catches a view of another dtype or size than its tensor."""
    slab = Slab(2**12, torch.device("cpu"))
    tensors = [torch.rand(5, 3), torch.arange(9), torch.ones(2, dtype=torch.bfloat16)]
    span = slab.spans.take(needed(tensors))
    assert span is not None
    views = slab.views(span, tensors)
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    for view, tensor in zip(views, tensors, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
