"""Muon's update of many matrices in place (arXiv 2502.16982, equations 1 to 4).

    M <- mu M + (1 - mu) G                               momentum
    U <- mu M + (1 - mu) G  with Nesterov, else M
    W <- (1 - lr wd) W - lr rms sqrt(max(rows, cols)) NewtonSchulz(U)

The momentum is kept as a moving average, as torch.optim.Muon keeps it: Moonlight's sum is
1 / (1 - mu) times it, and Newton-Schulz does not see the scale. Matrices of one shape go
through in chunks that stay in the cache from the gradient to the rounded weight.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kimi_pretrain.optim.orthogonalize import Table, Workspace, iteration_dtype


class Stack(NamedTuple):
    """The matrices of one parameter and what belongs to them, as views [count, rows, cols]."""

    weight: Tensor  # fp32 or fp64, updated in place
    grad: Tensor  # the weight's dtype
    momentum: Tensor  # the weight's dtype, updated in place
    rounded: Tensor | None = None  # the narrower parameter that follows the weight

    def part(self, first: int, last: int) -> "Stack":
        """The matrices [first, last)."""
        cut = slice(first, last)
        rounded = None if self.rounded is None else self.rounded[cut]
        return Stack(self.weight[cut], self.grad[cut], self.momentum[cut], rounded)


@dataclass(frozen=True)
class MuonSettings:
    """Hyperparameters of one parameter group."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    update_rms: float
    table: Table
    dtype: torch.dtype | None  # of the Newton-Schulz products; None: `iteration_dtype`


def muon_(stacks: Sequence[Stack], settings: MuonSettings) -> None:
    """Update all stacks; equally shaped matrices share batched Newton-Schulz products."""
    for alike in _by_shape(stacks):
        first = alike[0].weight
        rows, cols = first.shape[1:]
        count = sum(stack.weight.shape[0] for stack in alike)
        dtype = settings.dtype or iteration_dtype(first.dtype)
        workspace = Workspace(rows, cols, count, dtype, first.dtype, first.device)
        for pieces in _chunks(alike, workspace.capacity):
            _update(pieces, workspace, settings)


def _by_shape(stacks: Sequence[Stack]) -> list[list[Stack]]:
    groups: dict[object, list[Stack]] = defaultdict(list)
    for stack in stacks:
        if stack.weight.numel():
            weight = stack.weight
            key = (weight.shape[1:], weight.dtype, weight.device, stack.rounded is None)
            groups[key].append(stack)
    return list(groups.values())


def _chunks(stacks: Sequence[Stack], size: int) -> Iterator[list[Stack]]:
    """Cut a run of stacks into lists of `size` matrices each, the last one shorter."""
    pieces: list[Stack] = []
    room = size
    for stack in stacks:
        first, count = 0, stack.weight.shape[0]
        while first < count:
            last = min(count, first + room)
            pieces.append(stack if last - first == count else stack.part(first, last))
            room -= last - first
            first = last
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _update(pieces: list[Stack], workspace: Workspace, settings: MuonSettings) -> None:
    weights = [piece.weight for piece in pieces]
    grads = [piece.grad for piece in pieces]
    momenta = [piece.momentum for piece in pieces]
    lengths = [weight.shape[0] for weight in weights]
    count = sum(lengths)
    exact = workspace.exact[:count]  # [count, rows, cols]
    parts = torch.split(exact, lengths)

    torch._foreach_lerp_(momenta, grads, 1.0 - settings.momentum)
    if settings.nesterov:
        for grad, average, part in zip(grads, momenta, parts, strict=True):
            torch.lerp(grad, average, settings.momentum, out=part)
    else:
        torch.cat(momenta, out=exact)

    rows, cols = exact.shape[1:]
    scale = settings.update_rms * math.sqrt(max(rows, cols))
    # Widening first is faster than an addition of two dtypes.
    exact.copy_(workspace.orthogonalize(count, settings.table))
    torch._foreach_mul_(weights, 1.0 - settings.lr * settings.weight_decay)
    torch._foreach_add_(weights, parts, alpha=-settings.lr * scale)
    rounded = [piece.rounded for piece in pieces if piece.rounded is not None]
    if rounded:
        torch._foreach_copy_(rounded, weights)
