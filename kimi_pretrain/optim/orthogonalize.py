"""Newton-Schulz orthogonalisation of many matrices at once (Muon's inner loop).

One step maps X to a X + b (X X^T) X + c (X X^T)^2 X, which applies the odd polynomial
a s + b s^3 + c s^5 to every singular value s of X and leaves the singular vectors alone. A
table of coefficients is one (a, b, c) a step; after the last, all but the smallest singular
values are near 1, so that X is close to U V^T. Source: K. Jordan et al., "Muon" (2024);
arXiv 2502.16982, section 2.1.

The named tables, and the range to which each maps singular values of [1e-3, 1] and [1e-2, 1],
measured in float64 (a test measures them anew):

============= ===== ================ ================ =======================================
name          steps [1e-3, 1]        [1e-2, 1]        source
============= ===== ================ ================ =======================================
keller5       5     [0.4705, 1.2024] [0.6818, 1.1344] Jordan's Muon; Moonlight and K2
you5          5     [0.4749, 1.1451] [0.9777, 1.0318] Y. Jiacheng's per-step fit, as in Dion
polar_express 5     [0.8461, 1.1236] [0.8702, 1.1236] arXiv 2505.16932, with safety 1.01
cans          5     [0.8843, 1.1199] [0.8843, 1.1199] arXiv 2506.10935 (Emerging-Optimizers)
deepseek_v4   10    [0.9999, 1.0006] [0.9999, 1.0006] DeepSeek-V4: 8 fast steps, 2 exact ones
============= ===== ================ ================ =======================================
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.ops.precision import accumulate_dtype

Table = tuple[tuple[float, float, float], ...]

_KELLER = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def _with_safety(table: Table, factor: float) -> Table:
    """The same polynomials of s / factor: rounding in bf16 may lift a singular value above 1."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in table)


# The ranges of singular values that each reaches are in the module's docstring.
COEFFICIENTS: dict[str, Table] = {
    "keller5": (_KELLER,) * 5,
    "you5": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": _with_safety(_POLAR_EXPRESS, 1.01),
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    "deepseek_v4": (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}

# Working set of one batched product a thread. Between 2 and 4 MiB the speed is flat on Zen 4
# (1 MiB of L2 a core); a whole model's stack at once is a quarter slower.
_CPU_CHUNK_BYTES = 2 * 2**20
_ACCELERATOR_CHUNK_BYTES = 512 * 2**20


def coefficient_table(coefficients: str | Sequence[Sequence[float]]) -> Table:
    """A named table, or any sequence of (a, b, c), as a table.

    Raises:
        ConfigError: an unknown name, no steps, or a step without three numbers.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            names = ", ".join(COEFFICIENTS)
            raise ConfigError(
                "ns_coefficients", coefficients, f"a table is one of {names}", "keller5"
            )
        return COEFFICIENTS[coefficients]
    steps = [tuple(float(x) for x in step) for step in coefficients]
    if not steps or any(len(step) != 3 for step in steps):
        raise ConfigError(
            "ns_coefficients",
            coefficients,
            "a table is at least one (a, b, c), the factors of s, s^3 and s^5",
            "[[3.4445, -4.775, 2.0315]]",
        )
    return tuple((a, b, c) for a, b, c in steps)


def iteration_dtype(dtype: torch.dtype) -> torch.dtype:
    """The default dtype of the iteration on data of `dtype`: float64 for float64, else bf16."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


@torch.no_grad()
def newton_schulz(
    stack: Tensor,
    coefficients: str | Sequence[Sequence[float]] = "keller5",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Orthogonalise every matrix of a stack by itself.

    A matrix's result does not depend on the stack it came in (bit for bit with one thread).
    It is invariant to the scale of the matrix: norms are taken, and matrices divided by
    them, in fp32 (fp64) before anything is rounded to bf16. Zero matrices give zeros.

    Args:
        stack: [..., m, n], floating point.
        coefficients: a name in ``COEFFICIENTS`` or a sequence of (a, b, c), one a step.
        dtype: of the products; None is float64 for a float64 stack, bf16 otherwise.

    Returns:
        A new tensor of the stack's shape, in `dtype`.

    Raises:
        ConfigError: an unknown table, or a stack that holds no floating-point matrices.
    """
    table = coefficient_table(coefficients)
    if stack.ndim < 2 or not stack.is_floating_point():
        raise ConfigError(
            "newton_schulz",
            f"{stack.ndim}-D {stack.dtype}",
            "it takes floating-point matrices [..., m, n]",
            "vector[None] for a vector",
        )
    dtype = dtype or iteration_dtype(stack.dtype)
    rows, cols = stack.shape[-2:]
    result = torch.empty(stack.shape, dtype=dtype, device=stack.device)
    if stack.numel() == 0:
        return result
    source, target = stack.reshape(-1, rows, cols), result.view(-1, rows, cols)
    exact = torch.promote_types(accumulate_dtype(stack.dtype), accumulate_dtype(dtype))
    count = source.shape[0]
    workspace = Workspace(rows, cols, count, dtype, exact, stack.device)
    for first in range(0, count, workspace.capacity):
        last = min(first + workspace.capacity, count)
        workspace.exact[: last - first].copy_(source[first:last])
        target[first:last] = workspace.orthogonalize(last - first, table)
    return result


class Workspace:
    """Buffers for one chunk of equally shaped matrices, small enough to stay in the cache.

    Fill ``exact[:count]``, call ``orthogonalize(count, table)``, and use the result before
    the next call: it lies in a buffer.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        count: int,
        dtype: torch.dtype,
        exact_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for at most `count` matrices [rows, cols] iterated on in `dtype`."""
        self.tall = rows > cols
        self.capacity = _even_chunk(count, _matrices_per_chunk(rows, cols, dtype, device))
        gram = min(rows, cols)

        def buffer(height: int, width: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(self.capacity, height, width, dtype=kind, device=device)

        self.exact = buffer(rows, cols, exact_dtype)  # [capacity, rows, cols] fp32 or fp64
        self._iterate = buffer(rows, cols)
        self._next = buffer(rows, cols)
        self._gram = buffer(gram, gram)
        self._polynomial = buffer(gram, gram)

    def orthogonalize(self, count: int, table: Table) -> Tensor:
        """The orthogonalised ``exact[:count]``, which itself is left normalised.

        Returns:
            [count, rows, cols] in the workspace's dtype, a view valid until the next call.
        """
        exact = self.exact[:count]
        norm = torch.linalg.vector_norm(exact.flatten(1), dim=1)  # Frobenius, [count]
        # Below the floor, squares underflow; there a matrix shrinks towards zero, never to NaN.
        norm.clamp_(min=1e-150 if norm.dtype == torch.float64 else 1e-18)
        exact.mul_(norm.reciprocal_()[:, None, None])
        x, spare = self._iterate[:count], self._next[:count]
        gram, poly = self._gram[:count], self._polynomial[:count]
        x.copy_(exact)
        for a, b, c in table:
            # The smaller Gram matrix commutes with the polynomial: X X^T from the left for wide
            # matrices, X^T X from the right for tall ones. Nothing is transposed in memory.
            torch.bmm(x.mT if self.tall else x, x if self.tall else x.mT, out=gram)
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
            left, right = (x, poly) if self.tall else (poly, x)
            torch.baddbmm(x, left, right, beta=a, out=spare)
            x, spare = spare, x
        return x


def _matrices_per_chunk(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many matrices' iterates (two) and Gram matrices (two) fit the chunk."""
    one = 2 * (rows * cols + min(rows, cols) ** 2) * dtype.itemsize
    if device.type == "cpu":
        return max(1, _CPU_CHUNK_BYTES // one) * torch.get_num_threads()
    return max(1, _ACCELERATOR_CHUNK_BYTES // one)


def _even_chunk(count: int, limit: int) -> int:
    """The size of `count`'s chunks if they are as few and as equal as `limit` allows."""
    chunks = -(-count // limit)
    return -(-count // chunks)
