"""Patch projection: both backends compared with fp64 and torch's convolution, raw bytes, positions, the folds."""

import pytest
import torch
from support.gemm import SMALL, expected_linear
from support.gemm import make_pixels as pixels
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.gemm import patch_projection as patch_projection_module
from tritontower.kernels.gemm.aligned_rows import align_rows, include_padding
from tritontower.kernels.gemm.patch_projection import fold_normalization, fold_temporal, patch_projection

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
MEAN, STD, RESCALE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1 / 255


def weights(columns, inner, dtype, device="cpu", seed=1):
    """Weight, bias and a table of five positions, such that the sums are of order one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, inner, generator=generator) / inner**0.5
    bias, table = torch.randn(columns, generator=generator), torch.randn(5, columns, generator=generator)
    return [tensor.to(device, dtype) for tensor in (weight, bias, table)]


# 588 and 1176 are the still and the video patch of 14 × 14; 77 leaves rows at odd addresses.
@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "inner"),
    [
        (torch.float32, torch.float32, 1, 77),
        (torch.float32, torch.float16, 37, 588),
        (torch.float32, torch.bfloat16, 5, 1176),
        (torch.float16, torch.float16, 5, 1176),
        (torch.float16, torch.float32, 37, 77),
        (torch.bfloat16, torch.bfloat16, 1, 77),
        (torch.bfloat16, torch.float32, 37, 588),
        (torch.uint8, torch.float32, 37, 77),
        (torch.uint8, torch.float16, 1, 588),
        (torch.uint8, torch.bfloat16, 37, 588),
        (torch.uint8, torch.bfloat16, 5, 1176),
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_matches_fp64(device, kind, dtype, rows, inner):
    weight, bias, table = weights(20, inner, dtype, device)
    patches = pixels(rows, inner, kind, device)
    index = torch.arange(rows, device=device, dtype=torch.int32) * 3 % 5
    y = patch_projection(patches, weight, bias, position_table=table, position_index=index, config=SMALL)
    assert y.dtype == dtype
    assert relative_error(y, expected_linear(patches, weight, bias, None, table[index.long()])) <= tolerance(
        dtype, y.numel()
    )


@pytest.mark.parametrize(("kind", "garbage"), [(torch.uint8, 255), (torch.float32, float("nan"))])
def test_aligned_rows_have_the_same_bits(device, kind, garbage):
    weight, bias, _ = weights(20, 588, torch.bfloat16, device)
    patches = pixels(37, 588, kind, device)
    aligned = align_rows(patches)
    assert (aligned.stride(), align_rows(aligned) is aligned) == ((592, 1), True)
    assert include_padding(aligned).shape == (37, 592)
    assert include_padding(aligned[:, 1:]).shape == (37, 587)
    include_padding(aligned)[:, 588:] = garbage
    y = patch_projection(patches, weight, bias, config=SMALL)
    assert torch.equal(patch_projection(aligned, align_rows(weight), bias, config=SMALL), y)


@pytest.mark.parametrize("inner", [768, 1536])
def test_default_configuration_without_bias_or_positions(device, inner):
    weight, _, _ = weights(130, inner, torch.bfloat16, device)
    patches = pixels(3, inner, torch.float32, device)
    assert (
        relative_error(patch_projection(patches, weight), expected_linear(patches, weight)) <= TOLERANCE[torch.bfloat16]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [*FLOATS, torch.uint8])
@pytest.mark.parametrize("inner", [588, 1176, 768])
def test_towers_shapes_on_a_gpu(kernel_device, kind, dtype, inner):
    weight, bias, _ = weights(1280, inner, dtype, kernel_device)
    patches = pixels(5000, inner, kind, kernel_device)
    y = patch_projection(patches, weight, bias)
    assert relative_error(y, expected_linear(patches, weight, bias)) <= tolerance(dtype, y.numel())


def test_positions_without_index_go_row_by_row(device):
    weight, bias, table = weights(20, 77, torch.float32, device)
    patches = pixels(4, 77, torch.float32, device)
    y = patch_projection(patches, weight, bias, position_table=table, config=SMALL)
    assert relative_error(y, expected_linear(patches, weight, bias, None, table[:4])) <= TOLERANCE[torch.float32]


def test_is_the_convolution_of_the_tower():
    convolution = torch.nn.Conv3d(3, 24, (2, 14, 14), stride=(2, 14, 14), bias=False)
    patches = pixels(9, 1176, torch.float32)
    with torch.inference_mode():
        want = convolution(patches.view(9, 3, 2, 14, 14)).view(9, 24)
        got = patch_projection(patches, convolution.weight.flatten(1))
    assert relative_error(got, want.double()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "with_bias"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)]
)
def test_folded_bytes_equal_normalized_floats(device, dtype, with_bias):
    weight, bias, _ = weights(20, 588, torch.float32, device)
    bias = bias if with_bias else None
    raw = pixels(37, 588, torch.uint8, device)
    mean, std = (torch.tensor(values, dtype=torch.float64, device=device).view(1, 3, 1) for values in (MEAN, STD))
    normalized = ((raw.double().view(37, 3, 196) * RESCALE - mean) / std).view(37, 588)
    want = normalized @ weight.double().T + (0 if bias is None else bias.double())
    folded_weight, folded_bias = fold_normalization(weight, bias, mean=MEAN, std=STD, rescale_factor=RESCALE)
    got = patch_projection(raw, folded_weight.to(dtype), folded_bias.to(dtype), config=SMALL)
    # The folded weights are also rounded, so two roundings; neither changes the pixels.
    assert relative_error(got, want) <= 1.5 * TOLERANCE[dtype]


def test_folding_is_exact_in_fp64():
    weight, bias, _ = weights(6, 12, torch.float64)
    raw = torch.arange(0, 240, 20, dtype=torch.float64).view(1, 12)
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    normalized = (raw.view(3, 4) * RESCALE - mean[:, None]) / std[:, None]
    folded_weight, folded_bias = fold_normalization(weight, bias, mean=MEAN, std=STD, rescale_factor=RESCALE)
    got = (raw - 128) @ folded_weight.T + folded_bias
    assert relative_error(got, normalized.view(1, 12) @ weight.T + bias) <= 1e-14


@pytest.mark.parametrize("dtype", FLOATS)
def test_still_images_fold_their_two_equal_frames(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, 2, 14, 14, generator=generator).to(dtype)
    frame = torch.randn(4, 3, 1, 14, 14, generator=generator)
    folded = fold_temporal(weight)
    assert folded.shape == (8, 588)
    assert folded.dtype == dtype
    want = frame.expand(4, 3, 2, 14, 14).flatten(1).double() @ weight.flatten(1).double().T
    assert relative_error(frame.flatten(1).double() @ folded.double().T, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kind", "dtype", "inner"),
    [
        (torch.float32, torch.float32, 77),
        (torch.float32, torch.bfloat16, 588),
        (torch.uint8, torch.float32, 588),
        (torch.uint8, torch.float16, 588),
        (torch.uint8, torch.bfloat16, 77),
    ],
)
def test_reference_rows_do_not_depend_on_each_other(monkeypatch, kind, dtype, inner):
    monkeypatch.setattr(patch_projection_module, "CHUNK_ROWS", 512)
    weight, bias, table = weights(34, inner, dtype)
    patches = pixels(1025, inner, kind)
    index = torch.arange(1025, dtype=torch.int32) % 5

    def run(rows):
        return patch_projection(patches[rows], weight, bias, position_table=table, position_index=index[rows])

    batch = run(slice(None))
    for start, stop in ((0, 1), (17, 18), (1024, 1025), (5, 7), (40, 43), (3, 1020)):
        assert torch.equal(run(slice(start, stop)), batch[start:stop])


@pytest.mark.parametrize(
    ("weight", "bias", "mean", "std", "message"),
    [
        (torch.zeros(2, 10), None, MEAN, STD, r"multiple of the number of channels.*\(2, 10\)"),
        (torch.zeros(2, 9), None, MEAN, (1.0,), "3 and 1 values"),
        (torch.zeros(2, 9), None, MEAN, (1.0, 0.0, 1.0), "positive"),
        (torch.zeros(2, 9), torch.zeros(3), MEAN, STD, r"bias must have shape \(2,\), got \(3,\)"),
    ],
)
def test_invalid_normalization_is_rejected(weight, bias, mean, std, message):
    with pytest.raises(ValueError, match=message):
        fold_normalization(weight, bias, mean=mean, std=std, rescale_factor=RESCALE)


def test_flat_weights_have_no_frames_to_fold():
    with pytest.raises(ValueError, match=r"frames.*\(2, 9\)"):
        fold_temporal(torch.zeros(2, 9))
