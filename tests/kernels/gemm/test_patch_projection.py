"""Patch projection: both backends compared with fp64 and torch's convolution, raw bytes, positions, the folds."""

from dataclasses import replace

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.gemm import patch_projection as patch_projection_module
from tritontower.kernels.gemm.linear import LinearConfig
from tritontower.kernels.gemm.patch_projection import fold_normalization, fold_temporal, patch_projection
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.valid_rows import ValidRows

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SMALL = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1)
MEAN, STD, RESCALE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1 / 255


def pixels(rows, inner, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (rows, inner), generator=generator, dtype=dtype).to(device)
    return torch.randn(rows, inner, generator=generator).to(device, dtype)


def weights(columns, inner, dtype, device="cpu", seed=1):
    """Weight, bias and a table of five positions, such that the sums are of order one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, inner, generator=generator) / inner**0.5
    bias, table = torch.randn(columns, generator=generator), torch.randn(5, columns, generator=generator)
    return [tensor.to(device, dtype) for tensor in (weight, bias, table)]


def expected(patches, weight, bias=None, positions=None):
    """The formula in fp64; bytes count from 128, floats are cast to the weights' dtype first."""
    cast = patches.double() - 128 if patches.dtype == torch.uint8 else patches.to(weight.dtype).double()
    y = cast @ weight.double().T
    y = y if bias is None else y + bias.double()
    return y if positions is None else y + positions.double()


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
    assert relative_error(y, expected(patches, weight, bias, table[index.long()])) <= tolerance(dtype, y.numel())


@pytest.mark.parametrize("inner", [768, 1536])
def test_default_configuration_without_bias_or_positions(device, inner):
    weight, _, _ = weights(130, inner, torch.bfloat16, device)
    patches = pixels(3, inner, torch.float32, device)
    assert relative_error(patch_projection(patches, weight), expected(patches, weight)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [*FLOATS, torch.uint8])
@pytest.mark.parametrize("inner", [588, 1176, 768])
def test_towers_shapes_on_a_gpu(kernel_device, kind, dtype, inner):
    weight, bias, _ = weights(1280, inner, dtype, kernel_device)
    patches = pixels(5000, inner, kind, kernel_device)
    y = patch_projection(patches, weight, bias)
    assert relative_error(y, expected(patches, weight, bias)) <= tolerance(dtype, y.numel())


def test_positions_without_index_go_row_by_row(device):
    weight, bias, table = weights(20, 77, torch.float32, device)
    patches = pixels(4, 77, torch.float32, device)
    y = patch_projection(patches, weight, bias, position_table=table, config=SMALL)
    assert relative_error(y, expected(patches, weight, bias, table[:4])) <= TOLERANCE[torch.float32]


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


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_kernel_rows_do_not_depend_on_each_other(kernel_device, kind):
    weight, bias, _ = weights(20, 77, torch.bfloat16, kernel_device)
    patches = pixels(70, 77, kind, kernel_device)
    batch = patch_projection(patches, weight, bias)
    for start, stop in ((0, 1), (31, 33), (69, 70)):
        assert torch.equal(patch_projection(patches[start:stop], weight, bias), batch[start:stop])


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_rows_may_be_strided(device, kind):
    weight, bias, table = weights(20, 80, torch.float32, device)
    patches = pixels(37, 80, kind, device)[:, :77]
    weight, wide = weight[:, :77], torch.full((37, 24), 7.0, device=device)
    index = torch.zeros(37, dtype=torch.int32, device=device)
    table = torch.nn.functional.pad(table, (0, 3), value=float("nan"))[:, :20]
    out = wide[:, 2:22]
    got = patch_projection(patches, weight, bias, position_table=table, position_index=index, out=out, config=SMALL)
    assert got is out
    assert relative_error(out, expected(patches, weight, bias, table[:1])) <= TOLERANCE[torch.float32]
    assert (wide[:, :2] == 7).all()
    assert (wide[:, 22:] == 7).all()


@pytest.mark.parametrize(
    ("kind", "count"), [(torch.uint8, 0), (torch.float32, 33), (torch.uint8, 64), (torch.float32, 70)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_valid_rows_are_exact_and_padding_tiles_zero(kernel_device, kind, count):
    weight, bias, table = weights(20, 77, torch.bfloat16, kernel_device)
    patches = pixels(70, 77, kind, kernel_device)
    index = torch.arange(70, device=kernel_device, dtype=torch.int32) % 5
    how = {"position_table": table, "position_index": index, "config": SMALL}
    whole = patch_projection(patches, weight, bias, **how)
    valid_rows = ValidRows(70, torch.tensor([count], dtype=torch.int32, device=kernel_device))
    y = patch_projection(patches, weight, bias, **how, valid_rows=valid_rows)
    zeros = min(70, align_up(count, 32))
    assert torch.equal(y[:zeros], whole[:zeros])
    assert torch.equal(y[zeros:], torch.zeros_like(y[zeros:]))


@pytest.mark.parametrize(("kind", "dtype"), [(torch.uint8, torch.bfloat16), (torch.float32, torch.float16)])
def test_descriptors_give_the_bits_of_pointers(kernel_device, kind, dtype):
    # The descriptor pads patches with zeros; a zero byte counts as -128 there, but its weight is also zero.
    weight, bias, _ = weights(20, 80, dtype, kernel_device)
    patches = pixels(37, 80, kind, kernel_device)
    first, second = (
        patch_projection(patches, weight, bias, config=replace(SMALL, operands=operands))
        for operands in ("pointers", "descriptors")
    )
    assert torch.equal(first, second)


def test_configuration_is_selected_for_the_planned_rows(kernel_device, monkeypatch):
    chosen = []

    def choose(*sizes, pixels, dtype, device):
        chosen.append((*sizes, pixels, dtype))
        return SMALL

    monkeypatch.setattr(patch_projection_module, "choose_config", choose)
    weight, bias, _ = weights(20, 77, torch.float32, kernel_device)
    patches = pixels(7, 77, torch.uint8, kernel_device)
    want = patch_projection(patches, weight, bias, config=SMALL)
    assert torch.equal(patch_projection(patches, weight, bias, valid_rows=ValidRows(512)), want)
    patch_projection(patches, weight, bias)
    assert chosen == [(rows, 20, 77, torch.uint8, torch.float32) for rows in (512, 7)]


def test_no_patches(kernel_device):
    weight, bias, _ = weights(20, 77, torch.float32, kernel_device)
    assert patch_projection(pixels(0, 77, torch.uint8, kernel_device), weight, bias).shape == (0, 20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patches": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "patches, unless uint8, must be float32"),
        ({"weight": torch.zeros(6, 8, dtype=torch.int32)}, TypeError, "weight must be float32.*got torch.int32"),
        ({"patches": torch.zeros(32)}, ValueError, r"patches must be \[M, K\].*got shape \(32,\)"),
        ({"patches": torch.zeros(8, 4).T}, ValueError, "patches must have last stride 1.*contiguous"),
        ({"patches": torch.zeros(4, 0), "weight": torch.zeros(6, 0)}, ValueError, "patches must be .*K at least 1"),
        ({"weight": torch.zeros(6, 9)}, ValueError, r"weight must have shape \(6, 8\), got \(6, 9\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias must be torch.float32.*got torch.float16"),
        ({"position_table": torch.zeros(3, 6)}, ValueError, "at least 4 rows.*got 3; pass position_index"),
        ({"position_index": torch.zeros(4, dtype=torch.int32)}, ValueError, "position_table must be given"),
        (
            {"position_table": torch.zeros(3, 6), "position_index": torch.zeros(4, dtype=torch.int64)},
            TypeError,
            "position_index must be torch.int32",
        ),
        ({"out": torch.zeros(4, 5)}, ValueError, r"out must have shape \(4, 6\), got \(4, 5\)"),
    ],
)
def test_invalid_arguments_are_rejected(change, error, message):
    arguments = {"patches": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)} | change
    tensors = [arguments.pop(name) for name in ("patches", "weight", "bias")]
    with pytest.raises(error, match=message):
        patch_projection(*tensors, **arguments)


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
