"""Bytes on the device, by tag: each storage once."""

from functools import partial

import torch
from torch import Tensor, nn

from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.config.activation import GRADIENTS, WAITING
from kimi_pretrain.ops.main_grad import Product
from kimi_pretrain.ops.saved import named
from kimi_pretrain.pipeline.weigh import weighed


def add(weight: Tensor, grad: Tensor, x: Tensor) -> None:
    """What a product does when its turn comes; here it never does."""


def product(weight: Tensor, grad: Tensor, x: Tensor) -> Product:
    return Product(partial(add, weight, grad, x), x)


def test_a_tensor_that_waits_for_w_alone_is_not_its_tags() -> None:
    """Catches a weigher that loses an input once its microbatch is done, or counts weights."""
    weight, x, grad = nn.Parameter(torch.zeros(4, 8)), torch.zeros(16, 8), torch.zeros(16, 4)
    found = weighed(Activations.kept(), [product(weight, grad, x)])
    assert found == {WAITING: x.nbytes, GRADIENTS: grad.nbytes}


def test_a_storage_counts_once() -> None:
    """Catches bytes that are counted for each product which reads them, or for each view: an
    expert's up and gate share their input and have one gradient."""
    x, grad = torch.zeros(16, 8), torch.zeros(16, 4)
    weights = [nn.Parameter(torch.zeros(2, 8)) for _ in range(2)]
    both = [product(w, part, x) for w, part in zip(weights, grad.split(2, dim=1), strict=True)]
    assert weighed(Activations.kept(), both) == {WAITING: x.nbytes, GRADIENTS: grad.nbytes}


def test_what_a_tag_still_keeps_does_not_wait_for_w_too() -> None:
    """Catches an input counted twice while its microbatch's backward still runs."""
    activations = Activations.kept()
    saved = Saved(activations)
    x = torch.randn(16, 8, requires_grad=True)
    with saved.watching():
        kept = x.sigmoid()
        named("router", kept)
    grad = torch.zeros(16, 4)
    waiting = product(nn.Parameter(torch.zeros(4, 8)), grad, kept.detach())
    assert weighed(activations, [waiting]) == {"router": kept.nbytes, GRADIENTS: grad.nbytes}
    saved.close()
