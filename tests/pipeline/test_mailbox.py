"""What lies between stages, with a pipeline group that stands in."""

import gc
import weakref
from typing import cast

import pytest
import torch

from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.pipeline.mailbox import Mailbox
from tests.pipeline.one_rank import Operation, StandIn

SHAPES = [(1, 3, 4), (2, 5, 4)]


def mailbox(group: StandIn) -> Mailbox:
    return Mailbox(cast(Group, group), SHAPES, torch.float64, most=2)


def test_stages_of_one_rank_hand_over_directly() -> None:
    """Catches a copy, or another microbatch's tensor, between neighbours on one rank."""
    group = StandIn()
    mail = mailbox(group)
    tensors = {("activation", 1, m): torch.zeros(SHAPES[m]) for m in (0, 1)}
    for key, tensor in tensors.items():
        mail.put(key, tensor)
    for key, tensor in reversed(tensors.items()):
        assert mail.take(key) is tensor
    mail.close()
    assert group.log == []


def test_a_receive_is_posted_at_once_and_awaited_when_it_is_wanted() -> None:
    """Catches a post that blocks, buffers of another microbatch's shape, and a take that does not
    wait."""
    group = StandIn(0, 2)
    mail = mailbox(group)
    first = mail.post(("gradient", 0, 1), 1)
    second = mail.post(("activation", 2, 0), 1)
    assert group.log == ["receive from 1", "receive from 1"]
    assert not first.done
    assert not second.done
    got = mail.take(("gradient", 0, 1))
    assert group.log[2:] == ["await receive from 1"]
    assert (got.shape, got.dtype) == (SHAPES[1], torch.float64)
    assert torch.equal(got, torch.ones(SHAPES[1], dtype=torch.float64))
    assert mail.take(("activation", 2, 0)).shape == SHAPES[0]
    mail.close()


def test_what_leaves_is_kept_until_it_has_left() -> None:
    """Catches a tensor that is freed, and overwritten, while it is being sent."""
    group = StandIn(0, 2)
    mail = mailbox(group)
    kept = []
    handles = []
    for m in (0, 1):
        tensor = torch.zeros(SHAPES[m]).transpose(0, 1)  # sent contiguous, wherever it lies
        mail.put(("activation", 1, m), tensor)
        handles.append(mail.send(("activation", 1, m), 1))
        (to, sent) = group.sent.pop()
        assert to == 1
        assert sent.is_contiguous()
        kept.append(weakref.ref(sent))
        del tensor, sent
    gc.collect()
    assert all(reference() is not None for reference in kept)
    handles[0].wait()
    mail.put(("activation", 1, 0), torch.zeros(SHAPES[0]))
    mail.send(("activation", 1, 0), 1)  # looks whether something has left
    group.sent.clear()
    gc.collect()
    assert [reference() is not None for reference in kept] == [False, True]
    mail.close()
    assert all(isinstance(handle, Operation) and handle.awaited for handle in handles)
    gc.collect()
    assert kept[1]() is None


def test_no_more_leave_at_once_than_may() -> None:
    """Catches a step, or an evaluation, that keeps every tensor it has sent until its end: gloo's
    sends are not done before they are awaited."""
    group = StandIn(0, 2)
    mail = mailbox(group)
    kept = []
    for number in range(5):
        tensor = torch.zeros(SHAPES[0])
        kept.append(weakref.ref(tensor))
        mail.put(("activation", 1, number), tensor)
        del tensor
        mail.send(("activation", 1, number), 1)
        group.sent.clear()
        gc.collect()
        assert sum(reference() is not None for reference in kept) == min(number + 1, 2)
    assert group.log == ["send to 1"] * 3 + ["await send to 1", "send to 1"] * 2 + [
        "await send to 1"
    ]
    mail.close()


def test_what_nobody_took_is_an_error() -> None:
    """Catches a stage that ran without its input, or not at all."""
    mail = mailbox(StandIn(0, 2))
    mail.post(("activation", 1, 0), 1)
    with pytest.raises(RuntimeError, match=r"nobody took \[\('activation', 1, 0\)\]"):
        mail.close()
    with pytest.raises(KeyError):
        mail.take(("gradient", 1, 0))
