"""How one tensor is kept: the same bits and strides come back, once, and nothing stays."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from kimi_pretrain.activation.handles import Chain, Fp8Tile, Keep, Recompute, Ref
from kimi_pretrain.ops.fp8_tiles import dequantise_tiles, quantise_tiles


def test_a_view_comes_back_as_it_was() -> None:
    """Catches a view that is loaded contiguous, or from the start of its storage."""
    base = torch.arange(24.0).view(4, 6)
    view = base.t()[1:4, ::2]
    ref = Ref.of(view, Keep("norm_in", base))
    assert torch.equal(ref.load(), view)
    assert ref.load().stride() == view.stride()
    assert ref.load().data_ptr() == view.data_ptr()


def test_fp8_comes_back_close_and_is_cut_once() -> None:
    """Catches tiles of another shape than the rows, and a second copy beside what was loaded."""
    torch.manual_seed(0)
    rows = torch.randn(3, 200)
    handle = Fp8Tile("swiglu_in", rows, quantise_tiles, dequantise_tiles)
    assert [part.dtype for part in handle.parts] == [torch.float8_e4m3fn, torch.float32]
    loaded = Ref.of(rows, handle).load()
    assert torch.equal(loaded, dequantise_tiles(*quantise_tiles(rows), torch.float32))
    assert loaded.data_ptr() == Ref.of(rows, handle).load().data_ptr()
    assert handle.parts == []


def test_fp8_of_a_view_is_refused() -> None:
    """Catches tiles that run across the rows of what the view is cut from."""
    wide = torch.randn(4, 256)
    with pytest.raises(ValueError, match="from a contiguous tensor, not from a view"):
        Fp8Tile("swiglu_in", wide[:, :128], quantise_tiles, dequantise_tiles)


def test_a_chain_runs_once_for_all_its_results_and_lets_its_inputs_go() -> None:
    """Catches work that is done again for every reader, and inputs that stay until all is over."""
    source = torch.arange(4.0)
    calls = []

    def make(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        return x + 1, x * 2

    keep = Keep("norm_in", source)
    chain = Chain(make, [Ref.of(source, keep)])
    more, twice = Recompute("mla_up", chain, 0), Recompute("mla_up", chain, 1)
    gone = weakref.ref(keep)
    del keep
    assert torch.equal(twice.load(), source * 2)
    gc.collect()
    assert gone() is None
    assert torch.equal(more.load(), source + 1)
    assert calls == [False]


def test_chains_begin_where_others_end() -> None:
    """Catches a chain that needs its inputs to be kept themselves."""
    source = torch.arange(4.0)
    first = Recompute("norm_out", Chain(torch.neg, [Ref.of(source, Keep("norm_in", source))]), 0)
    second = Recompute("router_in", Chain(torch.exp, [Ref.of(source, first)]), 0)
    assert torch.equal(second.load(), torch.exp(-source))
