"""The interpreter's bf16 conversion, compared with torch's."""

import numpy as np
import pytest
import torch

from tritontower.kernels.runtime.interpreter import bfloat16_bits

triton = pytest.importorskip("triton")
tl = triton.language


def torch_bits(values):
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bits(bits):
    return np.asarray(bits, dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        (0x3F800000, 0x3F80),  # exact
        (0x3F807FFF, 0x3F80),  # just below the middle
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbor below
        (0x3F818000, 0x3F82),  # … and above
        (0x3F808001, 0x3F81),  # just above the middle
        (0x3FFFFFFF, 0x4000),  # the carry runs through the mantissa into the exponent
        (0x7F7FFFFF, 0x7F80),  # … and from the largest number to infinity
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),  # infinity stays
        (0xFF800000, 0xFF80),
        (0x00000000, 0x0000),
        (0x80000000, 0x8000),  # negative zero stays negative
        (0x00008000, 0x0000),  # subnormal tie
        (0x00018000, 0x0002),
        (0x007FFFFF, 0x0080),  # the largest subnormal becomes the smallest normal number
    ],
)
def test_rounding_case_by_case(bits, wanted):
    values = from_bits([bits])
    assert bfloat16_bits(values).tolist() == [wanted]
    assert torch_bits(values).tolist() == [wanted]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, 0xFFC00000, 0xFF800001, 0xFFFFFFFF])
def test_nan_stays_nan(bits):
    # Rounding its payload would carry some of these into infinity or zero.
    rounded = torch.from_numpy(bfloat16_bits(from_bits([bits])).view(np.int16)).view(torch.bfloat16)
    assert bool(rounded.isnan().all())


def test_agrees_with_torch_on_random_bit_patterns():
    values = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    numbers = ~np.isnan(values)
    assert np.array_equal(bfloat16_bits(values)[numbers], torch_bits(values)[numbers])


def test_keeps_the_shape_of_any_layout():
    values = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)[::2, ::-1].T
    assert np.array_equal(bfloat16_bits(values), torch_bits(np.ascontiguousarray(values)))


@triton.jit
def _convert_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_kernels_convert_as_torch_does(kernel_device, source, target):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(kernel_device, source)
    out = torch.empty(4096, dtype=target, device=kernel_device)
    _convert_kernel[(1,)](x, out, COUNT=4096)
    assert torch.equal(out, x.to(target))
