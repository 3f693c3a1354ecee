"""Linear layer and epilogues: both backends compared with fp64, split K, and row invariance."""

from dataclasses import replace

import pytest
import torch
from support.gemm import SMALL
from support.gemm import expected_linear as expected
from support.gemm import linear_inputs as inputs
from support.numbers import TOLERANCE, relative_error, tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from tritontower.kernels.gemm import cpu, vendor
from tritontower.kernels.gemm import linear as linear_module
from tritontower.kernels.gemm import torch_reference as linear_reference_module
from tritontower.kernels.gemm.linear import interleave_gated, linear
from tritontower.kernels.gemm.linear_config import EPILOGUES, GATED, epilogue_passes
from tritontower.kernels.gemm.tiles import can_use_descriptors
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.kernels.runtime.valid_rows import ValidRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *EPILOGUES]
VENDOR = replace(SMALL, vendor=True)


# One row and few columns; a K that fills its blocks, and ragged rows and columns; 588 = 18 blocks and a rest.
@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "inner"),
    [
        (torch.float32, 37, 40, 64),
        (torch.float16, 1, 3, 77),
        (torch.bfloat16, 37, 40, 64),
        (torch.bfloat16, 70, 20, 588),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("poisoned_empty")
def test_kernel_matches_fp64(kernel_device, dtype, activation, rows, columns, inner):
    x, weight, bias, residual = inputs(rows, columns, inner, dtype, activation, kernel_device)
    y = linear(x, weight, bias, activation=activation, residual=residual, config=SMALL)
    assert relative_error(y, expected(x, weight, bias, activation, residual)) <= tolerance(dtype, y.numel())


@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 3, 77), (7, 40, 64), (515, 20, 588)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_reference_matches_fp64(dtype, activation, rows, columns, inner):
    x, weight, bias, residual = inputs(rows, columns, inner, dtype, activation)
    y = linear(x, weight, bias, activation=activation, residual=residual)
    # An activation adds a second rounding, before it or before the residual.
    allowed = TOLERANCE[dtype] * (1 if activation is None else 1.5)
    assert relative_error(y, expected(x, weight, bias, activation, residual)) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_default_configuration_without_bias(kernel_device, dtype):
    x, weight, _, _ = inputs(130, 140, 150, dtype, device=kernel_device)
    assert relative_error(linear(x, weight), expected(x, weight)) <= tolerance(dtype, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 64, 200, 1024, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_towers_shapes_on_a_gpu(kernel_device, dtype, rows, activation):
    x, weight, bias, residual = inputs(rows, 1280, 1176, dtype, activation, kernel_device)
    y = linear(x, weight, bias, activation=activation, residual=residual)
    assert relative_error(y, expected(x, weight, bias, activation, residual)) <= tolerance(dtype, y.numel())


@pytest.mark.parametrize(
    ("activation", "inner", "split"), [(None, 128, 3), ("gelu", 77, 64), ("silu_gated_interleaved", 200, 2)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_split_sums_to_the_same_every_time(kernel_device, activation, inner, split):
    x, weight, bias, residual = inputs(37, 20, inner, torch.float32, activation, kernel_device)
    how = {"activation": activation, "residual": residual, "config": replace(SMALL, split=split)}
    y = linear(x, weight, bias, **how)
    assert torch.equal(y, linear(x, weight, bias, **how))
    assert relative_error(y, expected(x, weight, bias, activation, residual)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("threads", "fused", "gap"), [(1, True, 0), (2, True, 12), (2, False, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("restore_threads")
def test_reference_rows_do_not_depend_on_each_other(monkeypatch, threads, dtype, activation, fused, gap):
    torch.set_num_threads(threads)
    if not fused:
        monkeypatch.setattr(cpu, "has_onednn_matmul", lambda dtype: False)
    monkeypatch.setattr(linear_reference_module, "CHUNK_BYTES", 500 * 34 * 4)
    x, weight, bias, residual = inputs(1030, 34, 588, dtype, activation)

    def run(rows):
        plain = linear(x[rows], weight, bias, activation=activation)
        return plain, linear(x[rows], weight, bias, activation=activation, residual=residual[rows])

    # oneDNN multiplies strided rows by another kernel.
    if gap:
        x = torch.nn.functional.pad(x, (0, gap))[:, :588]
    batch = run(slice(None))
    for start, stop in ((0, 1), (17, 18), (1029, 1030), (5, 7), (40, 43), (100, 117), (0, 513), (3, 1028)):
        for part, whole in zip(run(slice(start, stop)), batch, strict=True):
            assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("config", [SMALL, VENDOR], ids=["blocks", "vendor"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "silu_gated"])
def test_out_may_be_the_residual(device, monkeypatch, activation, with_bias, config):
    monkeypatch.setattr(linear_reference_module, "CHUNK_BYTES", 8 * 20 * 2)
    x, weight, bias, residual = inputs(37, 20, 77, torch.bfloat16, activation, device)
    bias = bias if with_bias else None
    how = {"activation": activation, "residual": residual, "config": config}
    separate = linear(x, weight, bias, **how)
    assert linear(x, weight, bias, out=residual, **how) is residual
    assert torch.equal(residual, separate)


def test_descriptors_need_aligned_rows():
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert can_use_descriptors(matrix, matrix[:, :33])
    assert not can_use_descriptors(matrix, matrix[:, 1:])
    assert not can_use_descriptors(matrix.view(-1)[:480].view(8, 60))
    assert not can_use_descriptors(matrix[:1].expand(8, 64))
    assert not can_use_descriptors(matrix.T)
    assert can_use_descriptors(torch.zeros(3, 16, dtype=torch.uint8))


def test_older_chips_and_amd_use_pointers(monkeypatch):
    x, weight = torch.zeros(4, 16), torch.zeros(8, 16)
    config = replace(SMALL, operands="descriptors")
    for architecture in ARCHITECTURES:
        monkeypatch.setattr(linear_module.configs, "architecture", lambda device, name=architecture: name)
        left, right, described = linear_module.make_operands(x, weight, config, 2)
        assert described == (architecture in ("sm_90", "sm_100"))
        if described:
            assert (left.block_shape, right.block_shape) == ([32, 32], [32, 32])
            assert (list(left.shape), list(right.shape)) == ([4, 16], [8, 16])
        assert not linear_module.make_operands(x[:, 1:], weight[:, 1:], config)[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [activation for activation in ACTIVATIONS if activation not in GATED])
@pytest.mark.usefixtures("poisoned_empty")
def test_vendor_matches_fp64(kernel_device, dtype, activation):
    inputs_and_rows = inputs(37, 40, 77, dtype, device=kernel_device)
    for with_bias, with_residual in ((True, True), (True, False), (False, True), (False, False)):
        x, weight, bias, residual = inputs_and_rows
        bias, residual = bias if with_bias else None, residual if with_residual else None
        y = linear(x, weight, bias, activation=activation, residual=residual, config=VENDOR)
        # One rounding after the GEMM, one after the activation, one after the sum.
        roundings = 1 + (activation is not None) + (residual is not None and (with_bias or activation is not None))
        want = expected(x, weight, bias, activation, residual)
        assert relative_error(y, want) <= tolerance(dtype, want.numel()) * (1, 1.6, 2)[roundings - 1]


def test_vendor_computes_padding_too(kernel_device):
    x, weight, bias, _ = inputs(70, 20, 64, torch.float32, device=kernel_device)
    valid_rows = ValidRows(70, torch.tensor([3], dtype=torch.int32, device=kernel_device))
    assert torch.equal(
        linear(x, weight, bias, config=VENDOR, valid_rows=valid_rows), linear(x, weight, bias, config=VENDOR)
    )


@pytest.mark.parametrize(
    ("with_bias", "activation", "with_residual", "operations"),
    [
        (True, None, False, ["addmm"]),
        (False, None, False, ["mm"]),
        (False, None, True, ["addmm"]),
        (True, "gelu_tanh", False, ["_addmm_activation"]),
        (False, "gelu_tanh", False, ["mm", "activation"]),
        (True, "silu", True, ["addmm", "activation", "add"]),
        (True, None, True, ["addmm", "add"]),
    ],
)
def test_vendor_operations_on_a_gpu(monkeypatch, with_bias, activation, with_residual, operations):
    # The tensors pretend to be on a GPU; nothing is computed, and nothing is allocated.
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm", "_addmm_activation"):
                seen.append(name)
                assert options["out"] is y
                assert not getattr(torch.backends.cuda.matmul, flag)
                return y
            assert not name.startswith(("empty", "new_empty", "zeros"))
            return function(*arguments, **(options or {}))

    flag, seen = "allow_bf16_reduced_precision_reduction", []
    assert getattr(torch.backends.cuda.matmul, flag), "torch's default"
    monkeypatch.setattr(vendor, "apply_activation", lambda x, kind, out: seen.append("activation"))
    monkeypatch.setattr(vendor, "add", lambda x, y, out: seen.append("add"))
    monkeypatch.setattr(vendor, "on_gpu", lambda tensor: True)
    x, weight, bias, residual = inputs(5, 6, 8, torch.bfloat16)
    y = torch.empty(5, 6, dtype=torch.bfloat16)
    with Recorder():
        vendor.launch_vendor_gemm(
            x, weight, bias if with_bias else None, residual if with_residual else None, y, activation
        )
    assert seen == operations
    assert getattr(torch.backends.cuda.matmul, flag), "as before"


def test_vendor_rejects_gates_and_tf32():
    half, full = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    assert vendor.can_use_vendor_gemm(half, "gelu")
    assert vendor.can_use_vendor_gemm(full, None)
    assert not vendor.can_use_vendor_gemm(half, "silu_gated")
    assert not vendor.can_use_vendor_gemm(half, "silu_gated_interleaved")
    torch.set_float32_matmul_precision("high")
    try:
        assert vendor.can_use_vendor_gemm(half, None)
        assert not vendor.can_use_vendor_gemm(full, None)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert vendor.can_use_vendor_gemm(full, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_gates_give_the_bits_of_stacked_ones(device, dtype):
    x, weight, bias, residual = inputs(37, 20, 77, dtype, "silu_gated", device)
    stacked = linear(x, weight, bias, activation="silu_gated", residual=residual, config=SMALL)
    how = {"activation": "silu_gated_interleaved", "residual": residual, "config": SMALL}
    assert torch.equal(linear(x, interleave_gated(weight), interleave_gated(bias), **how), stacked)


def test_interleave_gated_by_hand():
    assert interleave_gated(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]
    assert interleave_gated(torch.arange(8).view(4, 2)).tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]
    with pytest.raises(ValueError, match=r"even number of rows, got shape \(3, 2\)"):
        interleave_gated(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_rows": 24}, r"blocks must be powers of two .*got \(24, 16, 32\)"),
        ({"block_inner": 8}, r"got \(32, 16, 8\)"),
        ({"split": 0}, "must be at least 1"),
        ({"passes": 3}, "passes must be 0.*got 3"),
        ({"operands": "tma"}, "operands must be one of pointers, descriptors, got 'tma'"),
    ],
)
def test_invalid_configurations_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_passes_for_every_epilogue():
    wide = replace(SMALL, block_columns=128)
    assert epilogue_passes(wide, None, "sm_90") == 1
    assert epilogue_passes(wide, "gelu_tanh", "sm_90") == 1
    assert epilogue_passes(wide, "gelu", "sm_90") == epilogue_passes(wide, None, "sm_90", residual=True) == 2
    assert epilogue_passes(wide, None, "sm_90", rotation=True) == 4
    assert epilogue_passes(wide, None, "gfx942", rotation=True) == 1
    assert epilogue_passes(SMALL, None, "sm_90", rotation=True) == 1
    assert epilogue_passes(replace(wide, passes=4), None, "gfx942") == 4
    assert epilogue_passes(replace(SMALL, passes=4), None, "sm_90") == 1
