"""Where a weight's gradient goes: to autograd, or straight into the weight's main gradient.

A parameter of a training run carries ``main_grad``, a view of its shape into a flat fp32
(fp64) buffer. The operation that computes a weight's gradient adds it there itself and tells
autograd that there is none: nothing narrow is kept from one microbatch to the next, and a
rank knows that a gradient is complete the moment it is. Without ``main_grad`` the gradient is
autograd's, as in any torch module.

A product of bf16 tensors is summed in fp32 and comes out rounded to bf16, once a microbatch:
torch's product with an fp32 result does not exist on the CPU. Norms and the embedding add
their fp32 sums unrounded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Product(NamedTuple):
    """A weight gradient that waits to be computed, and the input that waits with it."""

    add: partial[None]
    x: Tensor

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of its outputs, which wait too: what ``add`` holds beside x and weights."""
        held = (bound for bound in self.add.args if isinstance(bound, Tensor))
        return [one for one in held if one is not self.x and not isinstance(one, Parameter)]


class Deferral:
    """Where the matrix products of weight gradients wait, if they are to (design 4.3).

    Whoever drives a backward owns one, hangs it on its weights as ``main_grad_deferral`` and
    sets ``into`` while it wants products to wait; they are computed when it calls them.
    """

    def __init__(self) -> None:
        self.into: list[Product] | None = None


def deferred(weight: Tensor, x: Tensor, add: partial[None]) -> bool:
    """Whether ``add``, which adds a gradient from ``x`` to ``weight.main_grad``, was put off."""
    deferral: Deferral | None = getattr(weight, "main_grad_deferral", None)
    if deferral is None or deferral.into is None:
        return False
    deferral.into.append(Product(add, x))
    return True


def main_gradient(weight: Tensor) -> Tensor | None:
    """The weight's main gradient, or None where autograd is to have the gradient."""
    gradient: Tensor | None = getattr(weight, "main_grad", None)
    return gradient


def delivered(weight: Tensor) -> None:
    """Tell whoever waits for it that this microbatch's gradient of ``weight`` is added."""
    ready: Any = getattr(weight, "main_grad_ready", None)
    if ready is not None:
        ready()


def deliver(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """Add ``gradient`` (of the weight's shape, any dtype) to ``main_grad`` and return None.

    Without ``main_grad``, the gradient in the weight's dtype, for autograd.
    """
    main = main_gradient(weight)
    if main is None:
        return gradient.to(weight.dtype)
    main.add_(gradient.view_as(main))
    delivered(weight)
    return None


def deliver_product(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """``deliver(weight, grad.T @ x)``, now or when its deferral says.

    Equal dtypes are summed without a copy in between.

    Args:
        weight: [..., width_in], flattened to [width_out, width_in].
        grad: [rows, width_out].
        x: [rows, width_in].
    """
    if main_gradient(weight) is None:
        return torch.mm(grad.t(), x).view(weight.shape).to(weight.dtype)
    add = partial(_add_product, weight, grad, x)
    if not deferred(weight, x, add):
        add()
    return None


def add_product(main: Tensor, grad: Tensor, x: Tensor) -> None:
    """``main += grad.T @ x`` in place.

    Args:
        main: [width_out, width_in] fp32 (fp64), contiguous.
        grad: [rows, width_out].
        x: [rows, width_in].
    """
    if main.dtype == grad.dtype == x.dtype:
        main.addmm_(grad.t(), x)
    else:
        main.add_(torch.mm(grad.t(), x))


def adder(weight: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The ``add_product`` of a weight: the kernel that was hung on it, or plain torch."""
    chosen: Callable[[Tensor, Tensor, Tensor], None]
    chosen = getattr(weight, "main_grad_adder", add_product)
    return chosen


def _add_product(weight: Tensor, grad: Tensor, x: Tensor) -> None:
    main = main_gradient(weight)
    assert main is not None
    adder(weight)(main.view(-1, x.shape[1]), grad, x)
    delivered(weight)
