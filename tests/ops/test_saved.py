"""The seam between operations and whoever keeps what they save."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.saved import keeps, named, remade, remade_by, saving, tiled


class Told:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def named(self, tag: str, tensor: Tensor) -> None:
        self.calls.append((tag, tensor.shape))

    def remade(
        self,
        tag: str,
        make: Callable[..., Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        self.calls.append((tag, len(inputs), len(outputs)))

    def tiled(self, tag: str, tensor: Tensor) -> None:
        self.calls.append(("tiled", tag, tensor.shape))

    def keeps(self, tag: str) -> bool:
        return tag == "norm_in"


def test_without_a_saver_nothing_changes() -> None:
    """Catches an evaluation that pays for a policy, or an operation that needs one."""
    x = torch.ones(3)
    named("norm_in", x, None)
    assert torch.equal(remade("norm_out", torch.neg, x), -x)
    assert remade_by("norm_out", x, torch.neg, x) is x
    assert tiled("swiglu_in", x) is None
    assert keeps("attn_weights")


def test_a_saver_hears_of_everything_while_it_lasts() -> None:
    """Catches a saver that stays after its phase, or is lost with a nested one."""
    outer, inner = Told(), Told()
    x = torch.ones(3)
    with saving(outer):
        named("norm_in", x, None, x)
        with saving(inner):
            remade("mla_up", lambda a, b: (a, b, a + b), x, x)
            assert not keeps("norm_out")
            remade_by("swiglu_out", x, torch.neg, x)
            tiled("swiglu_in", x)
        with saving(None):
            named("head", x)
        named("tokens", x)
    named("norm_in", x)
    assert outer.calls == [("norm_in", (3,)), ("norm_in", (3,)), ("tokens", (3,))]
    assert inner.calls == [("mla_up", 2, 3), ("swiglu_out", 1, 1), ("tiled", "swiglu_in", (3,))]
