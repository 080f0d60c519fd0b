"""Block scales of released FP8 weights."""

import pytest
import torch

from kimi_pretrain.checkpoint.fp8_blocks import dequantise, scale_shape


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((576, 7168), (5, 56)), ((128, 128), (1, 1)), ((1, 129), (1, 2)), ((24576, 1536), (192, 12))],
)
def test_partial_blocks_have_a_scale_of_their_own(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Catches a floor where a ceiling belongs: K2's kv_a has 576 rows and 5 rows of scales."""
    assert scale_shape(shape) == expected


@pytest.mark.parametrize("shape", [(130, 257), (576, 96), (128, 128), (3, 300), (256, 128)])
def test_every_element_takes_its_own_block(shape: tuple[int, int]) -> None:
    """Catches scales that divide, are transposed, or shift at a partial edge block."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(shape, generator=generator).mul(50).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape), generator=generator) + 0.5
    values, scales = q.double().tolist(), scale.tolist()
    products = [
        [value * scales[i // 128][j // 128] for j, value in enumerate(row)]
        for i, row in enumerate(values)
    ]  # exact: 4 bits times 24 bits
    expected = torch.tensor(products, dtype=torch.float64).float()
    assert torch.equal(dequantise(q, scale), expected)


def test_all_bit_patterns() -> None:
    """Catches E5M2 read for E4M3, and a lost sign or subnormal."""
    bits = torch.arange(256, dtype=torch.uint8).view(2, 128)
    values = dequantise(bits.view(torch.float8_e4m3fn), torch.tensor([[2.0]])).flatten()
    for code, value in enumerate(values.tolist()):
        sign, exponent, fraction = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        if exponent == 15 and fraction == 7:
            assert value != value  # NaN
        elif exponent == 0:
            assert value == 2.0 * sign * fraction * 2.0**-9
        else:
            assert value == 2.0 * sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)
