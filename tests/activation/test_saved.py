"""Which storage is known by which tag."""

import gc

import pytest
import torch

from kimi_pretrain.activation.saved import Activations, Saved, UntaggedError
from kimi_pretrain.config.activation import policies
from kimi_pretrain.config.schema import ActivationConfig
from kimi_pretrain.ops.saved import named, remade

KEPT = Activations.kept()


def custom(**tags: str) -> Activations:
    return Activations(policies(ActivationConfig("custom", tags)))


def test_an_operation_may_save_what_is_named_after_it() -> None:
    """Catches a result of its own that an operation saves: nobody can name it before."""
    saved = Saved(KEPT)
    x = torch.randn(5, requires_grad=True)
    with saved.watching():
        y = x.sigmoid()
        named("router", y)
    saved.close()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (y * (1 - y)).detach())


def test_an_address_is_not_mistaken_for_the_storage_that_had_it() -> None:
    """Catches a tag that a freed tensor leaves to whoever gets its memory."""
    saved = Saved(custom(norm_out="recompute"))
    x = torch.randn(1000, requires_grad=True)
    with torch.no_grad(), saved.watching():
        named("norm_in", x.detach())
        remade("norm_out", torch.neg, x.detach())  # freed at once

    def save_others() -> None:
        with saved.watching():
            for _ in range(20):
                (x * torch.randn(1000)).sum()

    with pytest.raises(UntaggedError):
        save_others()


def test_what_nobody_saves_is_let_go() -> None:
    """Catches a name that keeps its tensor until backward."""
    saved = Saved(KEPT)
    with saved.watching():
        named("norm_in", torch.randn(1000))
        assert saved.device_bytes() == {"norm_in": 4000}
    saved.close()
    gc.collect()
    assert saved.device_bytes() == {}


def test_two_views_of_one_storage_are_kept_once() -> None:
    """Catches bytes that are counted, or copied to the host, for every view."""
    saved = Saved(KEPT)
    whole = torch.randn(10, 4, requires_grad=True)
    with saved.watching():
        both = whole * 1.0
        named("norm_in", both)
        left, right = both.split([1, 3], dim=1)
        total = (left * left).sum() + (right * right).sum()
    saved.close()
    assert saved.device_bytes() == {"norm_in": 160}
    total.backward()
    assert saved.device_bytes() == {}


def test_constants_are_neither_counted_nor_moved() -> None:
    """Catches tables of positions that leave the device with the first layer."""
    saved = Saved(custom(norm_in="offload"))
    table, x = torch.randn(3), torch.randn(3, requires_grad=True)
    saved.constants(table)
    with saved.watching():
        loss = (x * table).sum()
        named("norm_in", x)
    assert [handle.tag for handle in saved.offloadable()] == ["norm_in"]
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, table)
