import math
import re
from collections.abc import Iterator

import pytest
import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.optim import newton_schulz, orthogonalize
from kimi_pretrain.optim.orthogonalize import COEFFICIENTS, Workspace, coefficient_table


def reference(matrix: torch.Tensor, name: str = "keller5") -> torch.Tensor:
    """One matrix, in fp64, by the singular value decomposition and the scalar polynomial."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for a, b, c in COEFFICIENTS[name]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documented_ranges() -> dict[str, list[tuple[float, float]]]:
    """The table of the module's docstring: name -> ranges from [1e-3, 1] and from [1e-2, 1]."""
    row = re.compile(r"^(\w+) +(\d+) +\[(\S+), (\S+)\] \[(\S+), (\S+)\]", re.MULTILINE)
    found = row.findall(orthogonalize.__doc__ or "")
    for name, steps, *_ in found:
        assert len(COEFFICIENTS[name]) == int(steps)
    return {n: [(float(a), float(b)), (float(c), float(d))] for n, _, a, b, c, d in found}


@pytest.mark.parametrize("name", list(COEFFICIENTS))
def test_the_documented_singular_value_ranges_are_the_measured_ones(name: str) -> None:
    """Catches a mistyped coefficient and a table that promises more than it does."""
    for exponent, (low, high) in zip((-3, -2), documented_ranges()[name], strict=True):
        s = torch.logspace(exponent, 0, 200_001, dtype=torch.float64)
        for a, b, c in coefficient_table(name):
            s = a * s + b * s**3 + c * s**5
        assert low <= float(s.min()) < low + 1.01e-4
        assert high - 1.01e-4 < float(s.max()) <= high


@pytest.mark.parametrize("name", list(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(5, 24, 40), (5, 40, 24), (3, 16, 16), (2, 1, 7), (2, 7, 1)])
def test_fp64_equals_the_polynomial_of_the_singular_values(
    shape: tuple[int, int, int], name: str
) -> None:
    """Catches a tall matrix multiplied from the wrong side and coefficients out of order."""
    stack = random(*shape)
    result = newton_schulz(stack, name)
    assert result.dtype == torch.float64
    for got, matrix in zip(result, stack, strict=True):
        assert torch.allclose(got, reference(matrix, name), rtol=1e-9, atol=1e-10)


def test_leading_dimensions_are_a_batch_and_a_plain_matrix_works() -> None:
    """Catches experts orthogonalised together as one large matrix."""
    stack = random(3, 2, 8, 12)
    result = newton_schulz(stack)
    assert result.shape == stack.shape
    for e in range(3):
        for half in range(2):
            expected = newton_schulz(stack[e, half])
            assert torch.allclose(result[e, half], expected, rtol=1e-9, atol=1e-12)


def test_bf16_is_the_default_and_stays_near_the_exact_result() -> None:
    """Catches a normalisation after the cast, or sums kept in bf16."""
    stack = random(6, 64, 128, dtype=torch.float32)
    result = newton_schulz(stack)
    assert result.dtype == torch.bfloat16
    exact = torch.stack([reference(matrix) for matrix in stack])
    error = (result.double() - exact).norm() / exact.norm()
    assert error < 0.02
    singular = torch.linalg.svdvals(result.float())
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.25


def test_fp32_can_be_chosen() -> None:
    stack = random(2, 16, 24, dtype=torch.float32)
    result = newton_schulz(stack, dtype=torch.float32)
    exact = torch.stack([reference(matrix) for matrix in stack])
    assert torch.allclose(result.double(), exact, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tiny_and_huge_gradients_give_the_same_update(dtype: torch.dtype) -> None:
    """Catches norms taken in bf16 or floored at 1e-7, which shrink an update of 1e-12."""
    stack = random(2, 48, 32, dtype=torch.float32)
    expected = newton_schulz(stack, dtype=dtype).double()
    for scale in (1e-12, 1e-15, 1e12):
        scaled = newton_schulz(stack * scale, dtype=dtype).double()
        error = (scaled - expected).norm() / expected.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 1e-5), f"scale {scale}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_and_vanishing_matrices_give_no_nan(dtype: torch.dtype) -> None:
    """Catches 0/0 for an expert that saw no token, beside one that did."""
    stack = random(4, 16, 24, dtype=torch.float32)
    alone = newton_schulz(stack[:1], dtype=dtype)
    stack[1] = 0.0
    stack[2] *= 1e-30
    stack[3] *= 1e-38
    result = newton_schulz(stack, dtype=dtype)
    assert torch.isfinite(result).all()
    assert not result[1].any()
    assert torch.allclose(result[:1].double(), alone.double(), atol=1e-2)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (128, 256), (20, 20)])
def test_a_matrix_does_not_see_the_batch_it_came_in(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Catches results that change, bit for bit, with the number of experts on a rank."""
    stack = random(45, *shape, dtype=torch.float32)
    whole = newton_schulz(stack, dtype=dtype)
    for first, last in ((0, 1), (7, 8), (3, 20), (44, 45)):
        assert torch.equal(newton_schulz(stack[first:last], dtype=dtype), whole[first:last])
    assert torch.equal(newton_schulz(stack.flip(0), dtype=dtype).flip(0), whole)


def test_a_stack_larger_than_the_cache_is_cut_into_even_chunks() -> None:
    """Catches a last chunk that keeps another chunk's matrices."""
    stack = random(150, 64, 96, dtype=torch.float32)
    workspace = Workspace(64, 96, 150, torch.bfloat16, torch.float32, stack.device)
    chunks = math.ceil(150 / workspace.capacity)
    assert chunks > 1
    assert chunks * workspace.capacity - 150 < chunks
    result = newton_schulz(stack, dtype=torch.float32)
    for i in (0, 74, 149):
        expected = newton_schulz(stack[i], dtype=torch.float32)
        assert torch.allclose(result[i], expected, atol=1e-5)


def test_the_input_is_left_alone_and_may_be_a_strided_view() -> None:
    base = random(4, 12, 8)
    kept = base.clone()
    result = newton_schulz(base.mT[::2])
    assert torch.equal(base, kept)
    expected = newton_schulz(base.mT[::2].contiguous())
    assert torch.equal(result, expected)


def test_empty_stacks_pass() -> None:
    assert newton_schulz(torch.zeros(0, 4, 6)).shape == (0, 4, 6)
    assert newton_schulz(torch.zeros(2, 0, 6)).shape == (2, 0, 6)


def test_a_table_of_ones_own_is_accepted_and_nonsense_refused() -> None:
    stack = random(2, 6, 8)
    own = newton_schulz(stack, [[3.4445, -4.7750, 2.0315]] * 5)
    assert torch.equal(own, newton_schulz(stack))
    for bad in ("kellar", [], [(1.0, 2.0)]):
        with pytest.raises(ConfigError, match="ns_coefficients"):
            newton_schulz(stack, bad)
    for bad_stack in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="newton_schulz"):
            newton_schulz(bad_stack)
