"""The tiled loss against torch's cross entropy of whole logits, and what it holds in memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_pretrain.ops.linear_cross_entropy import IGNORED, TILE_ELEMENTS, linear_cross_entropy


def problem(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, denominator: int
) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = torch.nn.functional.cross_entropy(
        h @ w.t(), labels, reduction="sum", ignore_index=IGNORED
    )
    loss = loss / denominator
    return loss.detach(), *torch.autograd.grad(3.0 * loss, [h, w])


@pytest.mark.parametrize(
    "tile", [TILE_ELEMENTS, 7 * 53, 300 * 53, 40], ids=["one", "rows", "rows2", "columns"]
)
def test_loss_and_gradients_equal_the_whole_logits(tile: int) -> None:
    """A tile's edge, the online sum, an ignored label, or a factor applied twice shows here."""
    hidden, weight, labels = problem(31, 11, 53)
    loss = linear_cross_entropy(hidden, weight, labels, 17, tile)
    got = torch.autograd.grad(3.0 * loss, [hidden, weight])
    want = reference(hidden, weight, labels, 17)
    torch.testing.assert_close(loss.detach(), want[0], rtol=1e-12, atol=0)
    for g, w in zip(got, want[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)


def test_row_tiles_accumulate_the_weight_gradient() -> None:
    """More tokens than one tile holds: the last tile must not overwrite the others."""
    hidden, weight, labels = problem(600, 5, 9)
    loss = linear_cross_entropy(hidden, weight, labels, None, 256 * 9)
    got = torch.autograd.grad(loss * 3.0, [hidden, weight])
    want = reference(hidden, weight, labels, int((labels != IGNORED).sum()))
    torch.testing.assert_close(loss.detach(), want[0], rtol=1e-12, atol=0)
    for g, w in zip(got, want[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)


def test_bf16_keeps_the_gradient_of_a_confident_token() -> None:
    """Where the target has probability 0.9999, `softmax - 1` in bf16 would be 0 or -0.004."""
    hidden = torch.tensor([[9.25]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    loss.backward()
    want = reference(hidden, weight, torch.tensor([0]), 1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want[0], rtol=5e-3, atol=0)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double() * 3.0, want[1], rtol=8e-3, atol=0)


@pytest.mark.parametrize("tile", [TILE_ELEMENTS, 12], ids=["rows", "columns"])
def test_logits_of_several_hundred_stay_finite(tile: int) -> None:
    """The exponential of an unshifted logit overflows from 89 on in fp32."""
    hidden = torch.tensor([[500.0], [-500.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1, 2]), 1, tile)
    loss.backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    torch.testing.assert_close(loss.detach(), torch.tensor(1000.0 + 1.0986123))


def test_all_labels_ignored_gives_zero_and_zero_gradients() -> None:
    """A document of one token: 0 / 0 would poison the whole step."""
    hidden, weight, labels = problem(4, 3, 5)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(1024, 512), (64, 16_384)], ids=["rows", "columns"]
)
def test_logits_never_exist_at_once_and_none_are_saved(tokens: int, vocabulary: int) -> None:
    """At K2's vocabulary, whole logits of one microbatch are 2.7 GB."""
    tile = tokens * vocabulary // 4
    hidden, weight, labels = problem(tokens, 4, vocabulary, torch.float32)
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    )
    with hooks, Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, labels, None, tile)
        loss.backward()
    assert largest.elements <= max(tile, weight.numel())
    assert max(saved) <= max(hidden.numel(), weight.numel())


def test_a_cut_vocabulary_has_no_gradient_of_the_weight_but_the_main_one() -> None:
    """Catches a [vocabulary, width] tensor from F to I of every microbatch: 2.3 GB for K2."""
    hidden, weight, labels = problem(64, 64, 16_384, torch.float32)
    want = reference(hidden, weight, labels, 17)
    weight.main_grad = torch.zeros_like(weight, requires_grad=False)  # type: ignore[attr-defined]
    tile = 64 * 1024
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    )
    with hooks, Largest() as largest:
        (3.0 * linear_cross_entropy(hidden, weight, labels, 17, tile)).backward()
    assert largest.elements <= tile < weight.numel()
    assert sum(kept) <= hidden.numel() + 2 * len(labels) + 1  # states, labels, sums, and the 3
    assert weight.grad is None
    assert hidden.grad is not None
    torch.testing.assert_close(weight.main_grad.double(), want[2], rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]
    torch.testing.assert_close(hidden.grad.double(), want[1], rtol=1e-4, atol=1e-6)
