"""Which storage is known by which tag."""

import gc

import pytest
import torch

from kimi_pretrain.activation.offload import Offloader
from kimi_pretrain.activation.saved import Activations, Saved, UntaggedError
from kimi_pretrain.config.activation import policies
from kimi_pretrain.config.schema import ActivationConfig
from kimi_pretrain.ops.fp8_tiles import quantise_tiles
from kimi_pretrain.ops.saved import named, remade, remade_by, tiled
from kimi_pretrain.ops.swiglu import swiglu_by_tiles, swiglu_tiles, swiglu_tiles_backward

KEPT = Activations.kept()


def custom(**tags: str) -> Activations:
    chosen = policies(ActivationConfig("custom", tags))
    return Activations(chosen, Offloader(torch.device("cpu"), 2**16))


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


def test_an_operation_may_save_the_tiles_themselves() -> None:
    """Catches tiles that stay on the device, or lie there beside what they were cut from, and a
    chain that cannot start from them."""
    how = custom(swiglu_in="fp8+offload", swiglu_out="recompute")
    assert how.offloader is not None
    saved = Saved(how)
    x = torch.randn(3, 400, requires_grad=True)
    with saved.watching():
        gate_up = x * 1.0
        tiles = tiled("swiglu_in", gate_up)
        assert tiles is not None
        q, scale = quantise_tiles(x.detach())
        y = swiglu_by_tiles(gate_up, *tiles)
        remade_by("swiglu_out", y, lambda q, s: swiglu_tiles(q, s, torch.float32), *tiles)
        loss = (y * y).sum()
    saved.close()
    del gate_up, y, tiles
    assert saved.device_bytes() == {"swiglu_in": 1200 + 3 * 4 * 4}
    how.offloader.leave(saved.offloadable())
    how.offloader.settle(how.offloader.mark())
    assert saved.device_bytes() == {}
    how.offloader.fetch(saved.offloadable())
    loss.backward()
    grad = 2 * swiglu_tiles(q, scale, torch.float32)
    assert x.grad is not None
    assert torch.equal(x.grad, swiglu_tiles_backward(grad, q, scale))
