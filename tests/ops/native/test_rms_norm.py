"""RMSNorm's kernels: CPU loops, the CUDA source on the CPU, and torch's dispatch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_pretrain.ops.registry import select

DTYPES = [torch.bfloat16, torch.float32]
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 4e-6}
EPS = 1e-6
SMALL = [(5, 2048), (3, 1030), (4, 7), (270, 40)]
BEYOND_SHARED_MEMORY = [(2, 12296), (2, 12289)]  # a block's sums take more than 48 KiB


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and grad [rows, width], weight [width]; rows of 1e-3 to 1e3."""
    random = torch.Generator().manual_seed(rows * 10007 + width)
    x = torch.randn(rows, width, generator=random)
    x *= 10.0 ** torch.linspace(-3, 3, rows)[:, None]
    weight = 1 + 0.3 * torch.randn(width, generator=random)
    grad = torch.randn(rows, width, generator=random)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def exact(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, grad of x and grad of weight in fp64, by autograd."""
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    y = leaves[1] * leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + EPS).rsqrt()
    return y.detach(), *torch.autograd.grad(y, leaves, grad.double())


def close(got: Tensor, want: Tensor, relative: float) -> None:
    """Element by element, with a slack of a row's largest times fp32's rounding."""
    slack = 4e-6 * want.abs().amax(dim=-1, keepdim=True)
    assert ((got.double() - want).abs() <= relative * want.abs() + slack).all()


def through_doors(
    doors: Any, backend: str, x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    suffix = SUFFIX[x.dtype]
    y, scale = torch.full_like(x, torch.nan), torch.full((rows,), torch.nan)
    doors(f"rms_norm_{backend}_{suffix}", x, weight, EPS, y, scale, rows, width)
    grad_x, partial = torch.full_like(x, torch.nan), torch.full((264, width), torch.nan)
    grad_weight = torch.zeros(width)
    arguments = (grad, x, weight, scale, grad_x, partial, grad_weight, rows, width)
    doors(f"rms_norm_backward_{backend}_{suffix}", *arguments)
    return y, grad_x, grad_weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, *BEYOND_SHARED_MEMORY], ids=str)
def test_values_and_gradients(
    doors: Any, backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Catches a mean over the wrong count, a block's second row that meets the sums of its first
    (270 rows are more than there are blocks), columns that are left out, and rows too wide for
    shared memory that are refused, or summed there all the same."""
    x, weight, grad = inputs(*shape, dtype)
    results = through_doors(doors, backend, x, weight, grad)
    for got, want in zip(results, exact(x, weight, grad), strict=True):
        close(got, want, RELATIVE[dtype])


def test_the_instruction_set_does_not_change_bytes(doors: Any) -> None:
    """Catches a sum whose order follows the width of the machine's vectors."""
    x, weight, grad = inputs(5, 1000, torch.float32)
    results = []
    for isa in range(3):
        doors("cpu_isa", isa)
        results.append(
            torch.cat([t.flatten() for t in through_doors(doors, "cpu", x, weight, grad)])
        )
    assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32))
    assert torch.equal(results[0].view(torch.int32), results[2].view(torch.int32))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_and_its_autograd(dtype: torch.dtype) -> None:
    """Catches a gradient that is not registered, and rows that no strip or two strips take."""
    x, weight, grad = inputs(333, 96, dtype)
    leaf, parameter = x.view(3, 111, 96).requires_grad_(), weight.requires_grad_()
    y = select("rms_norm", "native", dtype=dtype)(leaf, parameter, EPS)
    got = torch.autograd.grad(y, [leaf, parameter], grad.view(3, 111, 96))
    want, want_x, want_weight = exact(x.detach(), weight.detach(), grad)
    close(y.detach().view(333, 96), want, RELATIVE[dtype])
    close(got[0].view(333, 96), want_x, RELATIVE[dtype])
    close(got[1], want_weight, RELATIVE[dtype])


@pytest.mark.usefixtures("native")
def test_the_weights_gradient_goes_to_its_main_gradient() -> None:
    """Catches a native norm that bypasses the fp32 main gradient of a training run."""
    x, weight, grad = inputs(50, 64, torch.bfloat16)
    parameter = nn.Parameter(weight)
    parameter.main_grad = torch.ones(64)  # type: ignore[attr-defined]
    select("rms_norm", "native")(x, parameter, EPS).backward(grad)
    assert parameter.grad is None
    close(parameter.main_grad - 1, exact(x, weight, grad)[2], 1e-5)


@pytest.mark.usefixtures("native")
def test_no_rows() -> None:
    """Catches uninitialised sums where a rank's experts got no token."""
    parameter = torch.ones(64, requires_grad=True)
    y = select("rms_norm", "native", dtype=torch.float32)(torch.ones(0, 64), parameter, EPS)
    y.sum().backward()
    assert parameter.grad is not None
    assert (parameter.grad == 0).all()


@pytest.mark.usefixtures("native")
def test_opcheck() -> None:
    """Catches a schema, a fake shape or an autograd kernel that torch.compile would trip over."""
    ops = torch.ops.kimi_pretrain
    x, weight = torch.randn(3, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS))
    _, scale = ops.rms_norm(x.detach(), weight.detach(), EPS)
    arguments = (torch.randn(3, 20), x.detach(), weight.detach(), scale)
    torch.library.opcheck(ops.rms_norm_backward, arguments)
