"""The largest logit of a head: the CPU loop, the CUDA source on the CPU, and torch's dispatch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.ops.registry import select

DTYPES = [torch.bfloat16, torch.float32]
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SCALE = 0.3


def inputs(length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [2, 3, length, width], head 1 with negative logits only; documents [2, length]."""
    random = torch.Generator().manual_seed(length * 1009 + width)
    q, k = (torch.randn(2, 3, length, width, generator=random) for _ in range(2))
    q[:, 1], k[:, 1] = q[:, 1].abs() + 0.1, -k[:, 1].abs() - 0.1
    starts = torch.rand(2, length, generator=random) < 0.1
    return q.to(dtype), k.to(dtype), starts.long().cumsum(1)


def exact(q: Tensor, k: Tensor, documents: Tensor | None) -> Tensor:
    """[sequences, heads] in fp64, from whole matrices."""
    logits = q.double() @ k.double().transpose(-1, -2) * SCALE
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None, :])[:, None]
    return logits.masked_fill(hidden, -torch.inf).amax(dim=(2, 3))


def by_cuda(doors: Any, q: Tensor, k: Tensor, documents: Any, chosen: Tensor) -> Tensor:
    sequences, heads, length, width = q.shape
    partial = torch.full((sequences * heads * -(-length // 64),), torch.nan)
    largest = torch.full((heads,), torch.nan)
    name = f"max_logits_cuda_{SUFFIX[q.dtype]}"
    documents = 0 if documents is None else documents
    doors(name, q, k, documents, chosen, SCALE, partial, largest, sequences, heads, length, width)
    return largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("shape", [(150, 24), (64, 16), (70, 7), (1, 5)], ids=str)
def test_of_pairs_that_attention_sees(
    doors: Any, backend: str, shape: tuple[int, int], masked: bool, dtype: torch.dtype
) -> None:
    """Catches a later key, another document's, a row past the end, a maximum that starts at 0
    (head 1 is negative), and columns left out of a product."""
    q, k, ids = inputs(*shape, dtype)
    documents = ids if masked else None
    want = exact(q, k, documents)
    length, width = shape
    if backend == "cuda":
        chosen = torch.tensor([True, True, False])
        got = by_cuda(doors, q, k, documents, chosen)
        torch.testing.assert_close(got[:2].double(), want.amax(0)[:2], rtol=1e-5, atol=1e-5)
        assert got[2] == -torch.inf
        return
    for sequence in range(2):
        for head in range(3):
            middle, found = length // 2, torch.full((2,), torch.nan)
            own = 0 if documents is None else documents[sequence]
            pair = (q[sequence, head], k[sequence, head], own, SCALE)
            for part, (first, last) in enumerate([(0, middle), (middle, length)]):
                doors(f"max_logits_cpu_{SUFFIX[dtype]}", *pair, found[part:], first, last, width)
            close = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(found.max().double(), want[sequence, head], **close)


def test_the_instruction_set_does_not_change_bytes(doors: Any) -> None:
    """Catches a sum in another order: whether a head is clipped would depend on the node."""
    q, k, _ = inputs(150, 24, torch.float32)
    found = torch.empty(3)
    for isa in range(3):
        doors("cpu_isa", isa)
        doors("max_logits_cpu_fp32", q[0, 0], k[0, 0], 0, SCALE, found[isa:], 0, 150, 24)
    assert (found == found[0]).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_the_op_equals_the_reference(masked: bool, dtype: torch.dtype) -> None:
    """Catches views and int32 ids that the glue misreads, several blocks of queries, and a NaN
    that is passed over: the step's guard would not see it."""
    q, k, ids = inputs(600, 24, dtype)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))  # not dense
    documents = ids.int() if masked else None
    chosen = torch.tensor([False, True, True])
    got, want = (
        select("max_logits", kernels, dtype=dtype)(q, k, SCALE, documents, chosen)
        for kernels in ("native", "reference")
    )
    assert got[0] == want[0] == -torch.inf
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    q[1, 2, 300, 3] = torch.nan
    got = select("max_logits", "native", dtype=dtype)(q, k, SCALE, documents, chosen)
    assert got.isnan().tolist() == [False, False, True]


def test_a_nan_is_the_largest_on_cuda(doors: Any) -> None:
    """Catches a comparison that drops a NaN, in a thread, a warp or among blocks."""
    q, k, _ = inputs(150, 24, torch.float32)
    chosen = torch.ones(3, dtype=torch.bool)
    for row in (0, 77, 149):
        broken = q.clone()
        broken[1, 0, row, 5] = torch.nan
        got = by_cuda(doors, broken, k, None, chosen)
        assert got.isnan().tolist() == [True, False, False]


@pytest.mark.usefixtures("native")
def test_opcheck() -> None:
    """Catches a schema or a fake shape that torch.compile would trip over."""
    q, k, ids = inputs(20, 8, torch.float32)
    chosen = torch.tensor([True, False, True])
    torch.library.opcheck(torch.ops.kimi_pretrain.max_logits, (q, k, SCALE, ids, chosen))
    torch.library.opcheck(torch.ops.kimi_pretrain.max_logits, (q, k, SCALE, None, chosen))
