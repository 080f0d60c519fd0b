"""MLPs that store gate and up as FP8 tiles: what backward makes of them, and in what room."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.config.activation import policies
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ActivationConfig
from kimi_pretrain.model.hand_out import hand_out
from kimi_pretrain.model.mlp import DenseMLP, Experts
from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.ops.registry import kernels_for
from kimi_pretrain.parallel.dispatch import Arrived, Route

BF16, FP32 = torch.bfloat16, torch.float32
WIDTH, INNER, ROWS = 96, 160, 32  # a tile of 128 holds the end of gate and the beginning of up


def kernels_of(name: str, dtype: torch.dtype) -> Kernels:
    try:
        return kernels_for(name, "cpu", dtype)
    except ConfigError as error:
        pytest.skip(str(error))


def stored(kernels: Kernels, **tags: str) -> Activations:
    chosen = policies(ActivationConfig("custom", {"swiglu_in": "fp8"} | tags))
    return Activations(chosen, quantise=kernels.quantise_tiles, dequantise=kernels.dequantise_tiles)


class Trip:
    """Rows forwards through an MLP that keeps gate and up as FP8 tiles, and backwards."""

    def __init__(self, mlp: DenseMLP | Experts, kernels: Kernels, **tags: str) -> None:
        hand_out(mlp, kernels)
        generator = torch.Generator().manual_seed(0)
        for weight in mlp.parameters():
            weight.data.normal_(0.0, 0.3, generator=generator)
        dtype = mlp.gate_up_proj.dtype
        self.x = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
        self.grad = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
        activations = stored(kernels, **tags)
        self.saved = Saved(activations)
        with self.saved.watching():
            self.saved.named("norm_out", self.x)
            self.y: Tensor = mlp(self.x if isinstance(mlp, DenseMLP) else arrived(self.x))
        self.saved.close()

    def backward(self) -> None:
        self.y.backward(self.grad)  # type: ignore[no-untyped-call]


def arrived(x: Tensor) -> Arrived:
    return Arrived(x, [ROWS // 2, ROWS // 2], None, Route())


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("again", ["keep", "recompute"])
def test_in_fp32_the_bits_are_those_of_swiglu_at_the_stored_rows(name: str, again: str) -> None:
    """Catches a gradient, or a result made again, of other rows than those in storage: of gate and
    up themselves, or with the scale of a neighbouring tile."""
    kernels = kernels_of(name, FP32)
    mlp = DenseMLP(WIDTH, INNER, FP32)
    trip = Trip(mlp, kernels, expert_down_in=again)
    gate_up = torch.nn.functional.linear(trip.x, mlp.gate_up_proj.flatten(0, 1)).detach()
    exact = kernels.swiglu(gate_up)
    rows = kernels.dequantise_tiles(*kernels.quantise_tiles(gate_up), FP32).requires_grad_()
    y = kernels.swiglu(rows)
    assert torch.equal(trip.y, torch.nn.functional.linear(exact, mlp.down_proj.weight))
    trip.backward()
    inner = y.detach() if again == "recompute" else exact
    assert torch.equal(mlp.down_proj.weight.grad, trip.grad.t() @ inner)  # type: ignore[arg-type]
    y.backward(trip.grad @ mlp.down_proj.weight)
    assert rows.grad is not None
    want = (rows.grad.t() @ trip.x).view_as(mlp.gate_up_proj)
    assert torch.equal(mlp.gate_up_proj.grad, want)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["reference", "native"])
def test_in_bf16_reading_tiles_is_as_close_as_rounding(name: str) -> None:
    """Catches a kernel that is not the derivative of the other: bf16 rows are rounded once more
    than tiles, each number by 2^-9, which gate's own size amplifies in the exponential."""
    kernels = kernels_of(name, BF16)
    gate_up = (torch.randn(ROWS, 2 * INNER, generator=torch.Generator().manual_seed(1)) * 4).to(
        BF16
    )
    tiles = kernels.quantise_tiles(gate_up)
    rows = kernels.dequantise_tiles(*tiles, BF16).requires_grad_()
    grad = torch.ones(ROWS, INNER, dtype=BF16)
    unfused = kernels.swiglu(rows)
    unfused.backward(grad)
    gate, up = rows.detach().float().chunk(2, dim=-1)
    fused = kernels.swiglu_tiles(*tiles, BF16)
    assert rows.grad is not None
    bound = 2.0**-7 * (2 + gate.abs())
    assert ((fused - unfused).abs() <= bound * unfused.abs() + 1e-6).all()
    fused_grad = kernels.swiglu_tiles_backward(grad, *tiles)
    scale = torch.cat([up.abs(), gate.abs()], dim=1) + 2.0**-6
    assert ((fused_grad - rows.grad).abs() <= bound.repeat(1, 2) * scale).all()


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the storages of ``size`` elements, none of them FP8, that operations return."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple) else (result,):
            if isinstance(made, Tensor) and made.dtype in (BF16, FP32):
                storage = made.untyped_storage()
                if storage.nbytes() == self.size * made.element_size():
                    self.found[storage.data_ptr()] = made
        return result


@pytest.mark.parametrize(
    "build",
    [lambda: DenseMLP(WIDTH, INNER, BF16), lambda: Experts(2, WIDTH, INNER, BF16)],
    ids=["dense", "experts"],
)
def test_the_wide_copy_never_exists(build: Callable[[], DenseMLP | Experts]) -> None:
    """Catches a backward, or a result that is made again, that widens all of gate and up first:
    twice their tiles' bytes, of every layer at its backward."""
    kernels = kernels_of("native", BF16)
    mlp = build()
    trip = Trip(mlp, kernels, expert_down_in="recompute", expert_up_in="fp8")
    sizes = trip.saved.device_bytes()
    wide = ROWS * 2 * INNER
    assert sizes["swiglu_in"] == wide + ROWS * 3 * 4  # codes, and the scales of three tiles a row
    with Made(wide) as made:
        trip.backward()
    (gradient,) = made.found.values()  # of gate and up, alone
    assert gradient.dtype == BF16


def test_no_tile_of_gate_and_up_is_widened_by_itself() -> None:
    """Catches the same without csrc/: storage that is loaded, whoever then reads it."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("gate and up were loaded whole")

    kernels = replace(REFERENCE, dequantise_tiles=refuse)
    mlp = DenseMLP(WIDTH, INNER, BF16)
    trip = Trip(mlp, kernels, expert_down_in="recompute")
    trip.backward()
    assert mlp.gate_up_proj.grad is not None
