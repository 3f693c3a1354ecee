"""Norms: residuals, gathers, valid rows, wide rows and transformers' bits; see ``test_promises`` for all else."""

import pytest
import torch
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.rowwise.norm import MAX_WIDTH, NormConfig, default_config, norm, split_width
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.kernels.runtime.valid_rows import ValidRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def inputs(rows, width, dtype, kind, device="cpu", seed=0):
    """x with a mean well away from zero, weights around one, and a bias where the kind has one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 2 + 3
    weight = torch.randn(width, generator=generator) * 0.2 + 1
    bias = torch.randn(width, generator=generator) if kind == "layer_norm" else None
    return [None if tensor is None else tensor.to(device, dtype) for tensor in (x, weight, bias)]


@pytest.mark.parametrize(("width", "rows"), [(768, 1), (768, 2), (768, 8), (5120, None), (MAX_WIDTH, None)])
def test_widths_and_configurations(kernel_device, width, rows):
    x, weight, bias = inputs(13 if rows else 2, width, torch.float32, "layer_norm", kernel_device)
    config = None if rows is None else NormConfig(rows=rows, num_warps=4)
    want = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS)
    assert relative_error(norm(x, weight, bias, kind="layer_norm", eps=EPS, config=config), want) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_residual_is_added_rounded_and_returned(device, dtype, gathered, given):
    x, weight, _ = inputs(37, 320, dtype, "rms_norm", device)
    residual, _, _ = inputs(37, 320, dtype, "rms_norm", device, seed=1)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device, torch.int32) if gathered else None
    total = x + residual
    place = torch.empty_like(x) if given else None
    how = {"residual": residual, "residual_out": place, "row_index": order}
    y, summed = norm(x, weight, kind="rms_norm", eps=EPS, **how)
    assert torch.equal(summed, total)
    assert (summed is place) == given
    ordered = total if order is None else total[order.long()]
    # What is normalized is the rounded sum, as if it had gone through memory.
    assert torch.equal(y, norm(ordered, weight, kind="rms_norm", eps=EPS))


@pytest.mark.usefixtures("poisoned_empty")
def test_rows_are_gathered(device):
    x, weight, bias = inputs(9, 96, torch.bfloat16, "layer_norm", device)
    order = torch.tensor([8, 0, 0, 3, 5], dtype=torch.int32, device=device)
    y = norm(x, weight, bias, kind="layer_norm", eps=EPS, row_index=order)
    assert torch.equal(y, norm(x[order.long()], weight, bias, kind="layer_norm", eps=EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_bit_equal_to_transformers(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    x, weight, _ = inputs(70, 1280, dtype, "rms_norm")
    for module, kind, rounding in (
        (Qwen2_5_VLRMSNorm(1280, eps=EPS), "rms_norm", "before_weight"),
        (Gemma3RMSNorm(1280, eps=EPS), "gemma_rms_norm", "once"),
    ):
        with torch.no_grad():
            module = module.to(dtype)
            module.weight.copy_(weight)
            assert torch.equal(norm(x, weight, kind=kind, eps=EPS, rounding=rounding), module(x))


def test_variance_survives_a_large_mean(device):
    # mean² is 10⁸ times the variance: E[x²] - E[x]² in fp32 would have no digit right.
    x = 1e4 + torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.ones(1024, device=device)
    y = norm(x, weight, kind="layer_norm", eps=EPS)
    assert relative_error(y, torch.nn.functional.layer_norm(x.double(), (1024,), eps=EPS)) <= 1e-3


@pytest.mark.parametrize("width", [1, 2, 3, 1024, 1152, 1280, 1408, 3584, 4095, 5120, MAX_WIDTH])
def test_blocks_cover_the_row_and_waste_little(width):
    head, tail = split_width(width)
    assert head + tail >= width
    assert head & (head - 1) == 0
    assert tail & (tail - 1) == 0
    if width.bit_count() <= 2:
        assert head + tail == width


@pytest.mark.parametrize(("width", "rows"), [(40, 37), (16, 16), (48, 5)])
@pytest.mark.parametrize("live", [0, 1, 16, 17, 37])
def test_rows_after_the_valid_ones_are_zero(
    width: int, rows: int, live: int, kernel_device: torch.device, poisoned_empty: None
) -> None:
    live = min(live, rows)
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, width, generator=generator).to(kernel_device) for _ in range(2))
    x[live:] = float("nan")
    weight = torch.randn(width, generator=generator).to(kernel_device)
    count = torch.tensor([live], dtype=torch.int32, device=kernel_device)
    config = NormConfig(rows=16, num_warps=4)
    how = {"kind": "rms_norm", "eps": 1e-6, "residual": residual, "config": config}
    expected, expected_sum = norm(x[:live], weight, **{**how, "residual": residual[:live]})
    actual, actual_sum = norm(x, weight, **how, valid_rows=ValidRows(64, count))
    assert torch.equal(actual[:live], expected)
    assert torch.equal(actual_sum[:live], expected_sum)
    beyond = align_up(live, 16)
    assert not actual[beyond:].any()
    assert not actual_sum[beyond:].any()
    assert torch.equal(
        norm(x, weight, kind="rms_norm", eps=1e-6, valid_rows=ValidRows(64, count))[beyond:], actual[beyond:]
    )


def test_valid_rows_cannot_count_reordered_sums(device: torch.device) -> None:
    x = torch.zeros(4, 16, device=device)
    index = torch.arange(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="row_index must be left out with valid_rows"):
        norm(x, x[0], kind="rms_norm", eps=1e-6, residual=x, row_index=index, valid_rows=ValidRows(4))


def test_sums_reach_beyond_32_bits(distant_storage, device):
    stride, width = 2**30 + 64, 64  # the third row begins after element 2³¹
    x, weight, _ = inputs(3, width, torch.float32, "rms_norm", device)
    far = distant_storage(3 * stride).as_strided((3, width), (stride, 1))
    how = {"weight": weight, "kind": "rms_norm", "eps": EPS}
    far.copy_(x)
    y, summed = norm(x, residual=far, **how)
    assert torch.equal(summed, x + x)
    assert torch.equal(y, norm(x, residual=x, **how)[0])
    assert norm(x, residual=x, residual_out=far, **how)[1] is far
    assert torch.equal(far, x + x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_configs_keep_rows_in_registers(architecture):
    lanes = 64 if architecture.startswith("gfx") else 32
    for width in (1, 64, 768, 1152, 1280, 5120, MAX_WIDTH):
        config = default_config(width, architecture)
        assert config.rows * sum(split_width(width)) / (config.num_warps * lanes) <= 64


X, WEIGHT = torch.zeros(4, 8), torch.zeros(8)
INDEX = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, MAX_WIDTH + 1)}, ValueError, f"D from 1 to {MAX_WIDTH}"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight must have shape \(8,\), got \(9,\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
        ({"kind": "batch_norm"}, ValueError, "kind must be one of .* got 'batch_norm'"),
        ({"kind": "rms_norm", "bias": WEIGHT}, ValueError, "bias must be left out for rms_norm"),
        ({"rounding": "twice"}, ValueError, "rounding must be one of .* got 'twice'"),
        ({"rounding": "before_weight"}, ValueError, "rounding must be 'once' for layer_norm"),
        ({"residual": torch.zeros(3, 8)}, ValueError, r"residual must have shape \(4, 8\), got \(3, 8\)"),
        ({"residual_out": X}, ValueError, "residual_out must be left out without a residual"),
        ({"residual": torch.zeros(4, 8), "residual_out": X}, ValueError, "residual_out must be neither x nor residual"),
        ({"row_index": INDEX.long()}, TypeError, "row_index must be torch.int32"),
        ({"row_index": INDEX[:3], "residual": X}, ValueError, "row_index must be a permutation of 4 rows"),
        ({"row_index": INDEX, "out": X}, ValueError, "out must not be x if rows are gathered"),
        ({"x": X[:0], "row_index": INDEX}, ValueError, "x must have rows for the 4 of row_index"),
    ],
)
def test_refusals(changes, error, message):
    arguments = {"x": X, "weight": WEIGHT, "kind": "layer_norm", "eps": EPS} | changes
    with pytest.raises(error, match=message):
        norm(**arguments)
