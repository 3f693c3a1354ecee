"""LayerNorm, RMSNorm and Gemma's RMSNorm: both backends against fp64, and against what transformers computes."""

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.rowwise.norm import MAX_WIDTH, NormConfig, _blocks, compile_specs, default_config, norm
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.kernels.runtime.valid_rows import ValidRows

KINDS = [("layer_norm", "once"), ("rms_norm", "once"), ("rms_norm", "before_weight"), ("gemma_rms_norm", "once")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def expected(x, weight, bias, kind):
    """The formula in fp64."""
    x, weight = x.double(), weight.double()
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.double(), EPS)
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return normalized * (weight + 1 if kind == "gemma_rms_norm" else weight)


def inputs(rows, width, dtype, kind, device="cpu", seed=0):
    """x with a mean well away from zero, weights around one, and a bias where the kind has one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 2 + 3
    weight = torch.randn(width, generator=generator) * 0.2 + 1
    bias = torch.randn(width, generator=generator) if kind == "layer_norm" else None
    return [None if tensor is None else tensor.to(device, dtype) for tensor in (x, weight, bias)]


def allowed(x, rounding):
    """One rounding; two of the same size and independent of each other where the definition has two."""
    return tolerance(x.dtype, x.numel()) * (1.5 if rounding == "before_weight" else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1280), (19, 1152), (3, 100), (2, 1), (5, 1664)])
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_matches_fp64(kernel_device, kind, rounding, dtype, rows, width):
    x, weight, bias = inputs(rows, width, dtype, kind, kernel_device)
    y = norm(x, weight, bias, kind=kind, eps=EPS, rounding=rounding)
    assert relative_error(y, expected(x, weight, bias, kind)) <= allowed(x, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1280), (67, 1152), (3, 100), (2, 1)])
@pytest.mark.usefixtures("poisoned_empty")
def test_reference_matches_fp64(kind, rounding, dtype, rows, width):
    x, weight, bias = inputs(rows, width, dtype, kind)
    y = norm(x, weight, bias, kind=kind, eps=EPS, rounding=rounding)
    assert relative_error(y, expected(x, weight, bias, kind)) <= allowed(x, rounding)


@pytest.mark.parametrize("width", [2048, 5120, MAX_WIDTH])
def test_wide_rows(kernel_device, width):
    x, weight, bias = inputs(2, width, torch.float32, "layer_norm", kernel_device)
    y = norm(x, weight, bias, kind="layer_norm", eps=EPS)
    assert relative_error(y, expected(x, weight, bias, "layer_norm")) <= TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_many_rows(kernel_device, kind, rounding, dtype):
    x, weight, bias = inputs(16384, 1280, dtype, kind, kernel_device)
    y = norm(x, weight, bias, kind=kind, eps=EPS, rounding=rounding)
    assert relative_error(y, expected(x, weight, bias, kind)) <= allowed(x, rounding)


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
    y, summed = norm(
        x,
        weight,
        kind="rms_norm",
        eps=EPS,
        residual=residual,
        residual_out=place,
        row_index=order,
    )
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


@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_rows_may_be_far_apart_and_written_in_place(device, kind, rounding):
    wide = torch.randn(11, 3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    untouched = wide.clone()
    _, weight, bias = inputs(1, 64, torch.float32, kind, device)
    want = norm(wide[:, 1].contiguous(), weight, bias, kind=kind, eps=EPS, rounding=rounding)
    view = wide[:, 1]
    assert norm(view, weight, bias, kind=kind, eps=EPS, rounding=rounding, out=view) is view
    assert torch.equal(view, want)
    assert torch.equal(wide[:, 0::2], untouched[:, 0::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
@pytest.mark.parametrize("width", [1280, 100])
def test_a_row_alone_equals_the_row_in_a_pack(device, kind, rounding, dtype, width):
    x, weight, bias = inputs(67, width, dtype, kind, device)
    pack = norm(x, weight, bias, kind=kind, eps=EPS, rounding=rounding)
    for row in (0, 33, 66):
        alone = norm(x[row : row + 1], weight, bias, kind=kind, eps=EPS, rounding=rounding)
        assert torch.equal(alone[0], pack[row])


def test_the_number_of_threads_does_not_matter():
    threads = torch.get_num_threads()
    x, weight, _ = inputs(333, 1280, torch.bfloat16, "rms_norm")
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(norm(x, weight, kind="rms_norm", eps=EPS))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_reference_and_kernel_differ_by_less_than_a_rounding(kernel_device, kind, rounding, dtype):
    x, weight, bias = inputs(33, 1280, dtype, kind, kernel_device)
    kernel = norm(x, weight, bias, kind=kind, eps=EPS, rounding=rounding)
    with dispatch.use("reference"):
        reference = norm(x, weight, bias, kind=kind, eps=EPS, rounding=rounding)
    assert relative_error(kernel, reference) <= TOLERANCE[dtype] / 4


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
    assert relative_error(y, expected(x, weight, None, "layer_norm")) <= 1e-3


def test_offsets_beyond_32_bits(distant_storage):
    # The third row begins beyond element 2³¹.
    stride, width = 2**30 + 64, 64
    check_distant_rows(distant_storage(3 * stride), stride, width)


def check_distant_rows(storage, stride, width):
    x = storage.as_strided((3, width), (stride, 1))
    x.copy_(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))
    weight = torch.ones(width, device=x.device)
    near = x.clone()
    residual = torch.ones_like(near)
    assert relative_error(norm(x, weight, kind="rms_norm", eps=EPS), expected(near, weight, None, "rms_norm")) <= 2e-6
    _, summed = norm(near, weight, kind="rms_norm", eps=EPS, residual=residual, residual_out=x)
    assert summed is x
    assert torch.equal(summed, near + 1)
    norm(x, weight, kind="rms_norm", eps=EPS, out=x)
    assert relative_error(x, expected(near + 1, weight, None, "rms_norm")) <= TOLERANCE[torch.float32]


def test_configuration_does_not_change_what_is_computed(kernel_device):
    x, weight, bias = inputs(13, 768, torch.float32, "layer_norm", kernel_device)
    want = expected(x, weight, bias, "layer_norm")
    for rows in (1, 2, 8):
        y = norm(x, weight, bias, kind="layer_norm", eps=EPS, config=NormConfig(rows=rows, num_warps=4))
        assert relative_error(y, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("width", [1, 2, 3, 1024, 1152, 1280, 1408, 3584, 4095, 5120, MAX_WIDTH])
def test_blocks_cover_the_row_without_waste_where_possible(width):
    head, tail = _blocks(width)
    assert head + tail >= width
    assert head & (head - 1) == 0
    assert tail & (tail - 1) == 0
    if width.bit_count() <= 2:
        assert head + tail == width


def test_no_rows(device):
    x, weight, bias = inputs(0, 64, torch.float32, "layer_norm", device)
    y, summed = norm(x, weight, bias, kind="layer_norm", eps=EPS, residual=x)
    assert y.shape == summed.shape == (0, 64)


X, WEIGHT = torch.zeros(4, 8), torch.zeros(8)
INDEX = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "float64"),
        ({"x": torch.zeros(8)}, ValueError, r"\(8,\)"),
        ({"x": torch.zeros(4, MAX_WIDTH + 1)}, ValueError, str(MAX_WIDTH)),
        ({"x": torch.zeros(8, 4).t()}, ValueError, "last stride 1"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight has shape \(9,\)"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, TypeError, "weight is torch.float16"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\)"),
        ({"kind": "batch_norm"}, ValueError, "batch_norm"),
        ({"kind": "rms_norm", "bias": WEIGHT}, ValueError, "no bias"),
        ({"rounding": "twice"}, ValueError, "twice"),
        ({"rounding": "before_weight"}, ValueError, "layer_norm rounds once"),
        ({"residual": torch.zeros(3, 8)}, ValueError, r"residual has shape \(3, 8\)"),
        ({"residual_out": X}, ValueError, "without a residual"),
        ({"residual": torch.zeros(4, 8), "residual_out": X}, ValueError, "rows of its own"),
        ({"out": torch.zeros(4, 9)}, ValueError, r"out has shape \(4, 9\)"),
        ({"out": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "out is torch.float16"),
        ({"row_index": INDEX.long()}, TypeError, "int64"),
        ({"row_index": INDEX[None]}, ValueError, r"\(1, 4\)"),
        ({"row_index": INDEX[:3], "residual": X}, ValueError, "permutation"),
        ({"row_index": INDEX, "out": X}, ValueError, "out is x"),
        ({"x": X[:0], "row_index": INDEX}, ValueError, "none"),
    ],
)
def test_refusals(changes, error, message):
    arguments = {"x": X, "weight": WEIGHT, "kind": "layer_norm", "eps": EPS} | changes
    with pytest.raises(error, match=message):
        norm(**arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_configurations_keep_rows_in_registers(architecture):
    lanes = 64 if architecture.startswith("gfx") else 32
    for width in (1, 64, 768, 1152, 1280, 5120, MAX_WIDTH):
        config = default_config(width, architecture)
        assert config.rows * sum(_blocks(width)) / (config.num_warps * lanes) <= 32
    names = [spec.name for spec in compile_specs(architecture)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("width", "rows"), [(40, 37), (16, 16), (48, 5)])
@pytest.mark.parametrize("live", [0, 1, 16, 17, 37])
def test_rows_beyond_the_live_ones_are_finite_and_the_others_unchanged(
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
    beyond = -(-live // 16) * 16
    assert not actual[beyond:].any()
    assert not actual_sum[beyond:].any()
    assert torch.equal(
        norm(x, weight, kind="rms_norm", eps=1e-6, valid_rows=ValidRows(64, count))[beyond:], actual[beyond:]
    )


def test_an_valid_rows_counts_the_rows_of_the_result(device: torch.device) -> None:
    x = torch.zeros(4, 16, device=device)
    index = torch.arange(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="another order"):
        norm(x, x[0], kind="rms_norm", eps=1e-6, residual=x, row_index=index, valid_rows=ValidRows(4))
