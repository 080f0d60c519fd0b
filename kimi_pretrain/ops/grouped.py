"""Grouped matrix product: consecutive groups of rows, each with a weight of its own.

Dropless experts have as many rows as tokens chose them. One product a group wastes no
row, but small experts then cost more in calls than in arithmetic; one batched product over
all groups pads every group to the largest. In between: neighbouring groups form runs, each
one batched product padded to its own largest group, where that is cheaper than more calls.
Experts of K2's size end up as one product each, without padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.ops.main_grad import (
    add_product,
    adder,
    deferred,
    deliver,
    delivered,
    main_gradient,
)
from kimi_pretrain.ops.runs import CALL_FLOPS, Run, cheapest_runs
from kimi_pretrain.ops.saved import named

Runs = tuple[Run, ...]


@dataclass(frozen=True)
class GroupLayout:
    """Where the rows of every group lie once runs are padded."""

    runs: Runs
    rows: int  # with padding
    position: Tensor | None  # [rows without padding] to padded row; None: nothing is padded


def group_layout(
    sizes: Sequence[int],
    flops_per_row: float,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> GroupLayout:
    """The layout that multiplies groups of these sizes in the shortest time.

    Args:
        sizes: rows of each group.
        flops_per_row: of one product; large rows make padding dear and calls cheap.
        dtype: of the rows; fast arithmetic makes calls dear.
        device: of the rows.
    """
    call_flops = CALL_FLOPS[str(dtype).removeprefix("torch.")]
    runs = cheapest_runs(sizes, call_flops / flops_per_row)
    total = sum(run.total for run in runs)
    if total == sum(sizes):
        return GroupLayout(runs, total, None)
    shifts, start, padded = [], 0, 0  # of each group: padded start minus start
    for run in runs:
        for size in sizes[run.first : run.last]:
            shifts.append(padded - start)
            start += size
            padded += run.rows
    shift = torch.tensor(shifts).repeat_interleave(torch.tensor(sizes), output_size=start)
    position = (shift + torch.arange(start)).to(device)
    named("route", position)
    return GroupLayout(runs, total, position)


def pad_rows(x: Tensor, layout: GroupLayout) -> Tensor:
    """[rows, width] to [rows with padding, width], zero in between."""
    if layout.position is None:
        return x
    return _Pad.apply(x, layout.position, layout.rows)  # type: ignore[no-any-return, no-untyped-call]


def unpad_rows(x: Tensor, layout: GroupLayout) -> Tensor:
    """The inverse of ``pad_rows``."""
    if layout.position is None:
        return x
    return _Unpad.apply(x, layout.position)  # type: ignore[no-any-return, no-untyped-call]


def grouped_linear(x: Tensor, weight: Tensor, layout: GroupLayout) -> Tensor:
    """``x_e @ weight[e].T`` for every group e of rows; no row is dropped.

    Args:
        x: [rows with padding, width_in], from ``pad_rows``.
        weight: [groups, ..., width_in], each group's flattened to [width_out, width_in].
        layout: of the rows.

    Returns:
        [rows with padding, width_out]. The weight's gradient has the stacked shape, zero
        for empty groups; padding adds to it what its gradient says, which is zero after
        ``unpad_rows``.
    """
    return _GroupedLinear.apply(x, weight, layout)  # type: ignore[no-any-return, no-untyped-call]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: GroupLayout) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.runs = weight, layout.runs  # not the layout: its tensor has a tag
        matrices = weight.flatten(1, -2)  # [groups, width_out, width_in]
        result = x.new_empty(x.shape[0], matrices.shape[1])
        transposed = matrices.transpose(1, 2)
        for run, rows, out in _runs(layout.runs, x, result):
            torch.bmm(rows, transposed[run.first : run.last], out=out)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grads[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            matrices = weight.flatten(1, -2)
            grad_x = torch.empty_like(x)
            for run, g, out in _runs(ctx.runs, grad, grad_x):
                torch.bmm(g, matrices[run.first : run.last], out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(weight, grad, x, ctx.runs)
        return grad_x, grad_weight, None


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor, runs: Runs) -> Tensor | None:
    if main_gradient(weight) is None:
        return _gradient(weight, grad, x, runs)
    add = partial(_add_gradient, weight, grad, x, runs)
    if not deferred(weight, x, add):
        add()
    return None


def _add_gradient(weight: Tensor, grad: Tensor, x: Tensor, runs: Runs) -> None:
    main = main_gradient(weight)
    assert main is not None
    total, add = main.flatten(1, -2), adder(weight)
    if main.dtype != grad.dtype and add is add_product:
        deliver(weight, _gradient(weight, grad, x, runs))
        return
    if add is not add_product:
        for run, g, rows in _runs(runs, grad, x):
            for index in range(run.last - run.first):
                add(total[run.first + index], g[index], rows[index])
        delivered(weight)
        return
    for run, g, rows in _runs(runs, grad, x):
        total[run.first : run.last].baddbmm_(g.transpose(1, 2), rows)
    delivered(weight)


def _gradient(weight: Tensor, grad: Tensor, x: Tensor, runs: Runs) -> Tensor:
    gradient = torch.empty_like(weight)
    matrices = gradient.flatten(1, -2)  # [groups, width_out, width_in]
    for run in runs:
        if not run.rows:
            matrices[run.first : run.last] = 0.0
    for run, g, rows in _runs(runs, grad, x):
        torch.bmm(g.transpose(1, 2), rows, out=matrices[run.first : run.last])
    return gradient


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(position)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, position, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return grads[0].index_select(0, position), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        ctx.rows = x.shape[0]
        return x.index_select(0, position)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (position,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, position, grad), None


def _runs(runs: Runs, a: Tensor, b: Tensor) -> Iterator[tuple[Run, Tensor, Tensor]]:
    """(run, its part of a, its part of b), parts [groups of the run, rows, width]."""
    start = 0
    for run in runs:
        groups = run.last - run.first
        stop = start + groups * run.rows
        if run.rows:
            shape = (groups, run.rows, -1)
            yield run, a[start:stop].view(shape), b[start:stop].view(shape)
        start = stop
