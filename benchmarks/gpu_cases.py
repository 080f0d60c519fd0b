"""Inputs for every operation that has a kernel, and the comparison of two ways to run it.

Nothing here needs a GPU: on the CPU the same lines compare the CPU kernels with plain torch, which
is how they are tested.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.grouped import group_layout
from kimi_pretrain.ops.kernels import REFERENCE
from kimi_pretrain.parallel.dispatch import plan_dispatch

Op = Callable[..., Any]
EXACT = -1.0  # instead of a tolerance: the same bytes
DIFFERENTIABLE = (
    *("swiglu", "rms_norm", "take_rows", "summed_rows", "weighted_rows"),
    *("attention", "grouped_linear"),
)


@dataclass(frozen=True)
class Case:
    """One operation on one set of arguments, which lie on the CPU."""

    op: str
    arguments: tuple[Any, ...]
    tolerance: float  # relative to the largest number of a result; EXACT
    moved: int | None = None  # bytes that it must read and write; None: bound by arithmetic
    moved_back: int | None = None  # the same of its gradient

    @property
    def differentiable(self) -> bool:
        """Whether it has a gradient to compare."""
        return self.op in DIFFERENTIABLE


@dataclass(frozen=True)
class Comparison:
    """How far apart two results are."""

    op: str
    worst: float  # relative to the largest number; 0: the same bytes
    passed: bool

    def __str__(self) -> str:
        return "same bytes" if self.worst == 0 else f"largest difference {self.worst:.1e}"


def cases(dtype: torch.dtype, rows: int, hidden: int, expert: int) -> list[Case]:
    """Every operation, on ``rows`` tokens of ``hidden`` and ``expert`` width."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    x, gate_up, grad = normal(rows, hidden), normal(rows, 2 * expert), normal(rows, expert)
    q, scale = REFERENCE.quantise_tiles(gate_up)
    weight = 1 + 0.1 * normal(hidden)
    slots, experts = 2, 8
    indices = torch.rand(rows, experts, generator=random).topk(slots).indices
    plan = plan_dispatch(indices, experts)
    order = (plan.order, plan.inverse)
    sent, weights = normal(rows * slots, hidden), torch.rand(rows, slots, generator=random)
    heads, length = 4, min(rows, 512)
    queries, keys = normal(1, heads, length, 96), normal(1, heads, length, 96)
    values, documents = normal(1, heads, length, 64), torch.arange(length)[None] // 100
    chosen = torch.tensor([True, True, False, True])
    sizes = torch.bincount(torch.randint(experts, (rows,), generator=random), minlength=experts)
    layout = group_layout(sizes.tolist(), 1e9, dtype)
    stacked = normal(experts, expert, hidden)
    tiles, both, permuted = q.nbytes + scale.nbytes, 2 * gate_up.nbytes, sent.nbytes + x.nbytes
    return [
        Case("quantise_tiles", (gate_up,), EXACT, gate_up.nbytes + tiles),
        Case("dequantise_tiles", (q, scale, dtype), EXACT, gate_up.nbytes + tiles),
        Case("swiglu", (gate_up,), rounding, gate_up.nbytes + grad.nbytes, both + grad.nbytes),
        Case("swiglu_tiles", (q, scale, dtype), rounding, tiles + grad.nbytes),
        Case("swiglu_tiles_backward", (grad, q, scale), rounding, tiles + grad.nbytes * 3),
        Case("rms_norm", (x, weight, 1e-6), rounding, 2 * x.nbytes, 3 * x.nbytes),
        Case("take_rows", (x, *order), rounding, permuted),
        Case("summed_rows", (sent, *order), rounding, permuted),
        Case("weighted_rows", (sent, weights, *order), rounding, permuted, permuted + sent.nbytes),
        Case("max_logits", (queries, keys, 0.1, documents, chosen), 1e-5),
        Case("attention", (queries, keys, values, 0.1, documents), 4 * rounding),
        Case("grouped_linear", (x, stacked, layout), 4 * rounding),
        Case("add_product", (torch.ones(expert, hidden), grad, x), 4 * rounding),
    ]


def compare(case: Case, by: Op, device: str) -> Comparison:
    """``by`` on ``device`` against plain torch on the CPU: results, and gradients where there are.

    Plain torch computes in fp32 at least; where bytes must be the same, on the same numbers.
    """
    mine = _outcome(case, by, _moved(case.arguments, device))
    wide = case.arguments if case.tolerance == EXACT else _widened(case.arguments)
    theirs = _outcome(case, getattr(REFERENCE, case.op), wide)
    if case.op == "attention":  # the second result is a bound, the tighter the better
        mine, theirs = [mine[0], *mine[2:]], [theirs[0], *theirs[2:]]
    worst = max(_distance(a, b) for a, b in zip(mine, theirs, strict=True))
    return Comparison(case.op, worst, worst <= max(case.tolerance, 0.0))


def _outcome(case: Case, op: Op, arguments: Sequence[Any]) -> list[Tensor]:
    """What ``op`` returns, or changes in place, and the gradients of its arguments."""
    if not case.differentiable:
        returned = op(*arguments)
        if returned is None:
            returned = arguments[0]
        return list(returned) if isinstance(returned, tuple) else [returned]
    leaves = _leaves(arguments)
    returned = op(*arguments)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    # A gradient of its own for every element, the same on every device.
    grads = [torch.cos(torch.arange(results[0].numel())).view(results[0].shape).to(results[0])]
    gradients = torch.autograd.grad(results[:1], leaves, grads)
    return [*(result.detach() for result in results), *gradients]


def forward(case: Case, by: Op, device: str) -> Callable[[], object]:
    """The case on ``device``, to be run as often as one likes."""
    arguments = _moved(case.arguments, device)
    return lambda: by(*arguments)


def backward(case: Case, by: Op, device: str) -> Callable[[], object]:
    """The same of its gradient."""
    arguments = _moved(case.arguments, device)
    leaves = _leaves(arguments)
    result = by(*arguments)
    grad = torch.ones_like(result)
    return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)


def _leaves(arguments: Sequence[Any]) -> list[Tensor]:
    floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return [a.requires_grad_() for a in floating]


def _moved(arguments: Sequence[Any], device: str) -> list[Any]:
    return [_on(a, device) for a in arguments]


def _on(argument: Any, device: str) -> Any:
    return argument.detach().clone().to(device) if isinstance(argument, Tensor) else argument


def _widened(arguments: Sequence[Any]) -> list[Any]:
    """bf16 as fp32; scales and FP8 stay what they are."""
    return [_wide(a) for a in arguments]


def _wide(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.dtype == torch.bfloat16:
        return argument.detach().float()
    return torch.float32 if argument is torch.bfloat16 else _on(argument, "cpu")


def _distance(mine: Tensor, theirs: Tensor) -> float:
    a, b = mine.cpu().double(), theirs.double()
    if bool((a == b).all()):
        return 0.0
    finite = torch.isfinite(b)
    if not bool((a[~finite] == b[~finite]).all()):
        return float("inf")
    return float((a - b)[finite].abs().max() / b[finite].abs().max())
