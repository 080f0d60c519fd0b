"""SwiGLU's kernels: CPU loops, the CUDA source on the CPU, and torch's dispatch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from kimi_pretrain.ops import fp8_tiles
from kimi_pretrain.ops.registry import select

DTYPES = [torch.bfloat16, torch.float32]
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Of the exact result: a rounding to bf16, or a few of fp32.
RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6}


def rows(width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[6, width], gates beyond both ends of the exponential's range among them."""
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(seed)) * 4
    x[0, :4] = torch.tensor([0.0, -0.0, 95.0, -95.0])[: min(4, width)]
    x[1] *= 20
    return x.to(dtype)


def exact(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU and its gradient in fp64, by autograd."""
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    y = silu(gate) * up
    return y.detach(), torch.autograd.grad(y, leaf, grad.double())[0]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    """Within the dtype's rounding of ``want``, and of 1e-6 of ``scale`` where it cancels."""
    slack = 1e-6 * (1.0 if scale is None else scale.double().abs())
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= RELATIVE[dtype] * want.abs() + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2048, 128, 136, 7])
def test_value_and_gradient(doors: Any, backend: str, width: int, dtype: torch.dtype) -> None:
    """Catches gate and up exchanged, a wrong derivative, and columns that a block leaves out."""
    gate_up, grad = rows(2 * width, dtype), rows(width, dtype, seed=1)
    want, want_grad = exact(gate_up, grad)
    y, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    doors(f"swiglu_{backend}_{SUFFIX[dtype]}", gate_up, y, 6, width)
    close(y, want, dtype)
    doors(f"swiglu_backward_{backend}_{SUFFIX[dtype]}", grad, gate_up, grad_gate_up, 6, width)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(grad_gate_up, want_grad, dtype, grad.double().repeat(1, 2) * torch.cat([up, gate], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [256, 192, 100])
def test_stored_tiles(doors: Any, backend: str, width: int, dtype: torch.dtype) -> None:
    """Catches the scale of a neighbouring tile: with widths of 192 and 100, the first tile of up
    begins inside one of gate's."""
    q, scale = fp8_tiles.quantise_tiles(rows(2 * width, dtype))
    gate_up = fp8_tiles.dequantise_tiles(q, scale, torch.float32)
    grad = rows(width, dtype, seed=1)
    want, want_grad = exact(gate_up, grad)
    y, grad_gate_up = torch.empty_like(grad), torch.empty(6, 2 * width, dtype=dtype)
    doors(f"swiglu_tiles_{backend}_{SUFFIX[dtype]}", q, scale, y, 6, width)
    close(y, want, dtype)
    name = f"swiglu_tiles_backward_{backend}_{SUFFIX[dtype]}"
    doors(name, grad, q, scale, grad_gate_up, 6, width)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(grad_gate_up, want_grad, dtype, grad.double().repeat(1, 2) * torch.cat([up, gate], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_instruction_set_does_not_change_bytes(doors: Any, dtype: torch.dtype) -> None:
    """Catches a fused multiply-add or a reordered sum in one set: runs would depend on the node.
    The width is odd, so that rows of bf16 begin between two words and end with half of one."""
    width = 501
    gate_up, grad = rows(2 * width, dtype), rows(width, dtype, seed=1)
    results = []
    for isa in range(3):
        doors("cpu_isa", isa)
        y, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
        doors(f"swiglu_cpu_{SUFFIX[dtype]}", gate_up, y, 6, width)
        doors(f"swiglu_backward_cpu_{SUFFIX[dtype]}", grad, gate_up, grad_gate_up, 6, width)
        results.append(torch.cat([y, grad_gate_up], dim=1).view(torch.uint8))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", range(3))
def test_neighbours_in_one_word_do_not_change_bytes(doors: Any, isa: int) -> None:
    """Catches a number of a pair that meets its neighbour, or is rounded otherwise: bf16 rows go
    two columns at a time, and the same rows from FP8 tiles one at a time."""
    doors("cpu_isa", isa)
    q, scale = fp8_tiles.quantise_tiles(rows(512, torch.bfloat16))
    scale = torch.ones_like(scale)  # bf16 holds what comes back
    gate_up = fp8_tiles.dequantise_tiles(q, scale, torch.bfloat16)
    grad = rows(256, torch.bfloat16, seed=1)
    results = []
    for name, source in (("swiglu", (gate_up,)), ("swiglu_tiles", (q, scale))):
        y, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
        doors(f"{name}_cpu_bf16", *source, y, 6, 256)
        doors(f"{name}_backward_cpu_bf16", grad, *source, grad_gate_up, 6, 256)
        results.append(torch.cat([y, grad_gate_up], dim=1).view(torch.int16))
    assert torch.equal(*results)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_and_its_autograd(dtype: torch.dtype) -> None:
    """Catches a gradient that is not registered, strides that are ignored, and empty rows."""
    wide = rows(1200, dtype)
    gate_up = wide[:, ::2].detach().requires_grad_()  # [6, 600], not dense
    grad = rows(300, dtype, seed=1)
    y = select("swiglu", "native", dtype=dtype)(gate_up)
    want, want_grad = exact(wide[:, ::2], grad)
    close(y, want, dtype)
    y.backward(grad)
    gate, up = gate_up.detach().double().chunk(2, dim=-1)
    assert gate_up.grad is not None
    close(gate_up.grad, want_grad, dtype, grad.double().repeat(1, 2) * torch.cat([up, gate], 1))
    assert select("swiglu", "native", dtype=dtype)(wide[:0]).shape == (0, 600)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tile_ops_equal_their_definitions(dtype: torch.dtype) -> None:
    """Catches a reference and a kernel that mean different things by one name."""
    q, scale = fp8_tiles.quantise_tiles(rows(600, dtype))
    grad = rows(300, dtype, seed=1)
    for name, arguments in (("swiglu_tiles", (q, scale, dtype)),
                            ("swiglu_tiles_backward", (grad, q, scale))):  # fmt: skip
        got = select(name, "native", dtype=dtype)(*arguments)
        want = select(name, "reference", dtype=dtype)(*arguments)
        torch.testing.assert_close(got, want, rtol=2.0**-7 if dtype.itemsize == 2 else 1e-5,
                                   atol=1e-4)  # fmt: skip


@pytest.mark.usefixtures("native")
def test_opcheck() -> None:
    """Catches a schema, a fake shape or an autograd kernel that torch.compile would trip over."""
    ops = torch.ops.kimi_pretrain
    gate_up = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(ops.swiglu, (gate_up,))
    torch.library.opcheck(ops.swiglu_backward, (torch.randn(3, 10), gate_up.detach()))
    q, scale = fp8_tiles.quantise_tiles(torch.randn(3, 20))
    rest = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.swiglu_tiles, (q, scale, torch.float32), test_utils=rest)
    arguments = (torch.randn(3, 10), q, scale)
    torch.library.opcheck(ops.swiglu_tiles_backward, arguments, test_utils=rest)
