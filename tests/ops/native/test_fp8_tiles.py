"""FP8 tiles: the same bytes from plain torch, the CPU loops, and the CUDA source on the CPU."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_pretrain.ops import fp8_tiles
from kimi_pretrain.ops.registry import select

DTYPES = [torch.bfloat16, torch.float32]
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
GUARD = 64  # elements behind an output that must stay as they are


def hard_rows(width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width]: magnitudes of 1e-30 to 1e30 mixed, zeros, denormals, outliers, the largest."""
    random = torch.Generator().manual_seed(width)

    def normal() -> Tensor:
        return torch.randn(width, generator=random)

    mixed = normal() * 10.0 ** (60 * torch.rand(width, generator=random) - 30)
    outlier = normal()
    outlier[width // 2] = 3e4
    largest = normal().sign() * torch.finfo(dtype).max
    ties = torch.arange(width) % 31 * 0.0625 + 448.0 - 30  # halfway between neighbours
    rows = [normal(), mixed, torch.zeros(width), normal() * 1e-39, outlier, largest, ties]
    rows += [normal() * 2.0**-120, -torch.zeros(width), normal() * 1e-30]
    return torch.stack(rows).to(dtype)


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor, and the bytes that lie behind it."""
    count = math.prod(shape)
    memory = torch.full(((count + GUARD) * dtype.itemsize,), 0x5A, dtype=torch.uint8)
    split = count * dtype.itemsize
    return memory[:split].view(dtype).view(shape), memory[split:]


def quantised(doors: Any, backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    q, behind_q = guarded(tuple(x.shape), torch.float8_e4m3fn)
    tiles = -(-x.shape[-1] // 128)
    scale, behind_scale = guarded((x.shape[0], tiles), torch.float32)
    doors(f"quantise_tiles_{backend}_{SUFFIX[x.dtype]}", x, q, scale, *x.shape)
    assert (behind_q == 0x5A).all()
    assert (behind_scale == 0x5A).all()
    return q, scale


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bit for bit; a NaN equals any NaN."""
    if got.dtype == torch.float8_e4m3fn:
        return torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    as_bits = {2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    equal = got.view(as_bits) == want.view(as_bits)
    return bool((equal | (got.isnan() & want.isnan())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 384, 1, 100, 129, 300, 1024, 1500])
def test_every_backend_gives_the_reference_bytes(
    doors: Any, backend: str, width: int, dtype: torch.dtype
) -> None:
    """Catches rounding other than to nearest even, a lane that is left out of the maximum, a
    ragged tile that reads its neighbour's row, and a write past the end."""
    x = hard_rows(width, dtype)
    q, scale = quantised(doors, backend, x)
    want_q, want_scale = fp8_tiles.quantise_tiles(x)
    assert same(scale, want_scale)
    assert same(q, want_q)
    back, behind = guarded(tuple(x.shape), dtype)
    doors(f"dequantise_tiles_{backend}_{SUFFIX[dtype]}", q, scale, back, *x.shape)
    assert same(back, fp8_tiles.dequantise_tiles(q, scale, dtype))
    assert (behind == 0x5A).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "at"), [(300, 299), (1500, 700), (1500, 1100), (1500, 1499)])
def test_a_tile_with_nan_or_infinity_is_marked(
    doors: Any, backend: str, dtype: torch.dtype, bad: float, width: int, at: int
) -> None:
    """Catches a broken activation that comes back as a plausible number, or spoils other tiles:
    in a group of eight that the CPU takes together, in a tile of its own, in a ragged one."""
    x = torch.ones(3, width, dtype=dtype)
    x[1, at] = bad
    tile = at // 128
    for q, scale in (quantised(doors, backend, x), fp8_tiles.quantise_tiles(x)):
        assert fp8_tiles.marked_tiles(scale).nonzero().tolist() == [[1, tile]]
        back, behind = guarded(tuple(x.shape), dtype)
        doors(f"dequantise_tiles_{backend}_{SUFFIX[dtype]}", q, scale, back, *x.shape)
        assert (behind == 0x5A).all()
        assert back[1, 128 * tile : 128 * (tile + 1)].isnan().all()
        assert back.isnan().sum() == min(width - 128 * tile, 128)
        assert back.nan_to_num(1.0).eq(1.0).all()


def test_all_bf16_numbers_round_as_torch_rounds(doors: Any, backend: str) -> None:
    """Catches a cast that is wrong in one binade only: every bf16 number beside a 448."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    small = every[every.abs() <= 448]  # leaves out NaN; with a 448 in the tile the scale is 1
    rows = small.repeat_interleave(1).view(-1, 1)
    x = torch.cat([torch.full_like(rows, 448.0), rows], dim=1).contiguous()
    q, scale = quantised(doors, backend, x)
    assert (scale == 1).all()
    assert same(q, x.to(torch.float8_e4m3fn))


def test_every_e4m3_byte_comes_back(doors: Any, backend: str) -> None:
    """Catches a subnormal, a zero's sign or a NaN byte that is decoded wrong."""
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    scale = torch.ones(1, 2)
    back = torch.empty(1, 256)
    doors(f"dequantise_tiles_{backend}_fp32", q, scale, back, 1, 256)
    assert same(back, q.to(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e4m3_byte_by_any_scale_is_rounded_once(
    doors: Any, backend: str, dtype: torch.dtype
) -> None:
    """Catches the short way through 16 products where it does not hold: results that bf16 cannot
    hold as normal numbers, scales of zero and infinity, the sign of zero."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    finite = every[(every & 0x7F) != 0x7F]
    mantissas = torch.tensor([1.0, 1.0 + 2.0**-8, 1.171875, 1.99609375, 1.9999999])
    powers = torch.arange(-126, 120).double().exp2().float()
    scale = (mantissas[:, None] * powers).flatten()
    scale = torch.cat([scale, torch.tensor([0.0, 2.0**-100, 2.0**100, torch.inf])])
    rows = torch.cat([finite[::2], finite[:1]]), torch.cat([finite[1::2], finite[:1]])
    for row in rows:  # 128 bytes each: one tile a scale
        q = row.view(torch.float8_e4m3fn).expand(len(scale), 128).contiguous()
        back = torch.empty(q.shape, dtype=dtype)
        doors(f"dequantise_tiles_{backend}_{SUFFIX[dtype]}", q, scale, back, *q.shape)
        assert same(back, fp8_tiles.dequantise_tiles(q, scale[:, None], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_within_e4m3s_bound(dtype: torch.dtype) -> None:
    """Catches a scale that clips, or that wastes E4M3's range: 2^-4, or 2^-10 of the scale."""
    x = hard_rows(512, dtype)
    q, scale = fp8_tiles.quantise_tiles(x)
    back = fp8_tiles.dequantise_tiles(q, scale, torch.float32).double()
    unit = scale.double().repeat_interleave(128, dim=-1)
    bound = torch.maximum(x.double().abs() * 2.0**-4, unit * 2.0**-10) * (1 + 1e-6)
    assert ((back - x.double()).abs() <= bound).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 384), (2, 100), (0, 128), (70,), (600, 512)], ids=str)
def test_the_op_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches shapes, dtypes or threads that the glue between torch and the loops gets wrong."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, scale = select("quantise_tiles", "native", dtype=dtype)(x)
    want_q, want_scale = fp8_tiles.quantise_tiles(x)
    assert q.shape == want_q.shape
    assert same(q, want_q)
    assert torch.equal(scale, want_scale)
    back = select("dequantise_tiles", "native", dtype=dtype)(q, scale, dtype)
    assert torch.equal(back, fp8_tiles.dequantise_tiles(q, scale, dtype))


@pytest.mark.usefixtures("native")
def test_the_op_refuses_what_it_cannot_read() -> None:
    """Catches strides that are ignored, and scales that belong to another tensor."""
    quantise = torch.ops.kimi_pretrain.quantise_tiles
    dequantise = torch.ops.kimi_pretrain.dequantise_tiles
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        quantise(torch.ones(256, 128).t())
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        quantise(torch.ones(2, 128, dtype=torch.float64))
    q, _ = quantise(torch.ones(2, 256))
    with pytest.raises(RuntimeError, match="one number a tile"):
        dequantise(q, torch.ones(2, 1), torch.float32)


@pytest.mark.usefixtures("native")
def test_opcheck() -> None:
    """Catches a schema that hides an alias, and fake shapes that differ from the real ones."""
    ops = torch.ops.kimi_pretrain
    for dtype in DTYPES:
        torch.library.opcheck(ops.quantise_tiles, (torch.randn(3, 200).to(dtype),))
        q, scale = ops.quantise_tiles(torch.randn(3, 200).to(dtype))
        # test_schema multiplies its inputs, which torch has no E4M3 for.
        rest = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        torch.library.opcheck(ops.dequantise_tiles, (q, scale, dtype), test_utils=rest)


@pytest.fixture(scope="module")
def cuda_s_own(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """cuda_fp8.h's conversions, which the GPU build uses, as it defines them for the host."""
    header = Path("/usr/local/cuda/include/cuda_fp8.h")
    if not header.exists() or shutil.which("g++") is None:
        pytest.skip("needs g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("cuda_fp8")
    source, library = folder / "casts.cpp", folder / "casts.so"
    source.write_text(
        "#include <cuda_fp8.h>\n"
        'extern "C" void narrow(const float* x, unsigned char* q, long n) {\n'
        "  for (long i = 0; i < n; i++)\n"
        "    q[i] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3);\n}\n"
        'extern "C" void widen(const unsigned char* q, float* x, long n) {\n'
        "  for (long i = 0; i < n; i++)\n"
        "    x[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(q[i], __NV_E4M3)));\n}\n"
    )
    command = ["g++", "-shared", "-fPIC", f"-I{header.parent}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def test_cuda_s_own_cast_agrees(doors: Any, cuda_s_own: ctypes.CDLL) -> None:
    """Catches a difference between our cast and cuda_fp8.h's, which the GPU build uses."""
    x = torch.randn(1, 2**16).exp().mul(8).clamp(max=448).view(-1, 128)
    x[:, 0] = 448.0
    theirs = torch.empty(x.shape, dtype=torch.uint8)
    cuda_s_own.narrow(*_pointers(x, theirs), ctypes.c_long(x.numel()))
    q, _ = quantised(doors, "cpu", x)
    assert torch.equal(q.view(torch.uint8), theirs)


def test_cuda_s_own_way_back_agrees(doors: Any, cuda_s_own: ctypes.CDLL) -> None:
    """Catches a byte that the GPU build decodes otherwise than we do: all 256, NaN and the
    subnormals among them, by way of half precision, which holds them exactly."""
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    theirs, ours = torch.empty(256), torch.empty(256)
    cuda_s_own.widen(*_pointers(q, theirs), ctypes.c_long(256))
    doors("dequantise_tiles_cpu_fp32", q, torch.ones(2), ours, 1, 256)
    assert same(ours, theirs)
