"""Block-quantised FP8 against loops over blocks and elements, written from V3 section 3.3.2."""

import math

import pytest
import torch

from lm import fp8
from tests.helpers import refused

SIZES = [(1, 1), (3, 5), (128, 128), (128, 129), (129, 128), (255, 257), (300, 40), (40, 300), (256, 384)]


def blocks(rows, columns):
    """The index and slices of each 128 x 128 block; those at the edges are smaller."""
    for i in range(math.ceil(rows / 128)):
        for j in range(math.ceil(columns / 128)):
            yield (
                (i, j),
                (slice(128 * i, min(128 * i + 128, rows)), slice(128 * j, min(128 * j + 128, columns))),
            )


def drawn(rows, columns):
    """Weights whose blocks differ in magnitude by a factor of a thousand."""
    weight = torch.randn(rows, columns)
    for _, where in blocks(rows, columns):
        weight[where] *= 10 ** torch.empty(()).uniform_(-2, 1)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_weights_are_the_fp8_numbers_times_their_blocks_scale(rows, columns, dtype):
    weight = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128)) + 0.01
    want = torch.empty(rows, columns, dtype=dtype)
    for place, where in blocks(rows, columns):
        want[where] = (weight[where].float() * scales[place]).to(dtype)
    assert torch.equal(fp8.dequantize(weight, scales, dtype), want)


def test_scales_multiply_in_fp32_and_bf16_is_the_default():
    weight = torch.tensor([[448.0, 1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    assert fp8.dequantize(weight, scale).dtype == torch.bfloat16
    wide = fp8.dequantize(weight, scale, torch.float32)
    assert wide.tolist() == [[448 * 1.0078125, 1.125 * 1.0078125]]  # bf16 can represent neither


@pytest.mark.parametrize("rows, columns", SIZES)
def test_quantised_and_back_is_within_half_a_step(rows, columns):
    weight = drawn(rows, columns)
    small, scales = fp8.quantize(weight)
    assert small.dtype == torch.float8_e4m3fn and small.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    back = fp8.dequantize(small, scales, torch.float32)
    for place, where in blocks(rows, columns):
        largest = weight[where].abs().max()
        assert scales[place] == largest / 448
        # e4m3 has 3 mantissa bits and no exponent below -6: half a step is 1/16 of the power of two
        exponent = (weight[where].double().abs() / scales[place]).clamp(min=2.0**-6).log2().floor()
        half_step = 2.0 ** (exponent - 4) * scales[place].double()
        off = (back[where].double() - weight[where].double()).abs()
        assert (off <= half_step * (1 + 1e-6)).all()
        assert back[where].abs().max() == pytest.approx(largest.item(), rel=1e-6)  # nothing saturates


def test_what_fp8_holds_exactly_comes_back_exactly():
    exact = torch.randn(200, 200).to(torch.float8_e4m3fn).float()
    for _, where in blocks(200, 200):
        exact[where][0, 0] = 448.0  # so that the scale is 1
    small, scales = fp8.quantize(exact)
    assert torch.equal(scales, torch.ones(2, 2)) and torch.equal(small.float(), exact)


def test_zeros_stay_zeros():
    weight = torch.zeros(130, 130)
    weight[0, 0] = 3.0
    small, scales = fp8.quantize(weight)
    assert scales.tolist() == [[pytest.approx(3 / 448), 1.0], [1.0, 1.0]]
    assert torch.equal(fp8.dequantize(small, scales, torch.float32) != 0, weight != 0)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2, 1), (4,), (3, 2), (256, 130)])
def test_a_wrong_number_of_scales_is_rejected(shape):
    weight = torch.zeros(256, 130).to(torch.float8_e4m3fn)
    refused(lambda: fp8.dequantize(weight, torch.ones(shape)), shape, "(2, 2)")


def test_what_is_not_a_matrix_is_rejected():
    with pytest.raises(ValueError, match=r"\(7,\)"):
        fp8.dequantize(torch.zeros(7).to(torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        fp8.quantize(torch.zeros(2, 3, 4))
