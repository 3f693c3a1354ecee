"""Linear layer and epilogues: both backends compared with fp64, split K, and row invariance."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from tritontower.kernels.gemm import cpu, vendor
from tritontower.kernels.gemm import linear as linear_module
from tritontower.kernels.gemm import torch_reference as linear_reference_module
from tritontower.kernels.gemm.linear import interleave_gated, linear
from tritontower.kernels.gemm.linear_config import EPILOGUES, GATED, LinearConfig, epilogue_passes
from tritontower.kernels.gemm.tiles import can_use_descriptors
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.kernels.runtime.valid_rows import ValidRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *EPILOGUES]
SMALL = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1)
"""Several tiles in every direction for the shapes here, and a group of row tiles that is not full."""
VENDOR = replace(SMALL, vendor=True)


def expected(x, weight, bias=None, activation=None, residual=None):
    """The formula in fp64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if activation in GATED:
        gate, up = y.chunk(2, dim=1) if activation == "silu_gated" else (y[:, ::2], y[:, 1::2])
        y = torch.nn.functional.silu(gate) * up
    elif activation == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    elif activation is not None:
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual.double()


def inputs(rows, columns, inner, dtype, activation=None, device="cpu", seed=0):
    """x, weight, bias and residual, such that the sums are of order one."""
    generator = torch.Generator().manual_seed(seed)
    width = columns * 2 if activation in GATED else columns
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(width, inner, generator=generator) / inner**0.5
    bias = torch.randn(width, generator=generator)
    residual = torch.randn(rows, columns, generator=generator)
    return [tensor.to(device, dtype) for tensor in (x, weight, bias, residual)]


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


@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_kernel_rows_do_not_depend_on_each_other(kernel_device, dtype, split):
    x, weight, bias, residual = inputs(70, 20, 77, dtype, device=kernel_device)
    config = replace(SMALL, split=split)

    def run(rows):
        return linear(x[rows], weight, bias, activation="quick_gelu", residual=residual[rows], config=config)

    batch = run(slice(None))
    for start, stop in ((0, 1), (31, 33), (69, 70)):
        assert torch.equal(run(slice(start, stop)), batch[start:stop])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_rows_do_not_depend_on_each_other(monkeypatch, threads, dtype, activation, fused):
    if not fused:
        monkeypatch.setattr(cpu, "has_onednn_matmul", lambda dtype: False)
    monkeypatch.setattr(linear_reference_module, "CHUNK_BYTES", 500 * 34 * 4)
    x, weight, bias, residual = inputs(1030, 34, 588, dtype, activation)

    def run(rows):
        plain = linear(x[rows], weight, bias, activation=activation)
        return plain, linear(x[rows], weight, bias, activation=activation, residual=residual[rows])

    batch = run(slice(None))
    for start, stop in ((0, 1), (17, 18), (1029, 1030), (5, 7), (40, 43), (100, 117), (0, 513), (3, 1028)):
        for part, whole in zip(run(slice(start, stop)), batch, strict=True):
            assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("inner", [77, 1176, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_reference_rows_do_not_depend_on_each_other(threads, dtype, inner):
    storage, weight, bias, _ = inputs(600, 48, inner + 12, dtype)
    x, weight = storage[:, :inner], weight[:, :inner]
    batch = linear(x, weight, bias)
    for start, stop in ((0, 1), (9, 10), (50, 53), (599, 600)):
        assert torch.equal(linear(x[start:stop], weight, bias), batch[start:stop])


@pytest.mark.parametrize("activation", [None, "gelu", "silu_gated"])
def test_out_may_be_the_residual(device, monkeypatch, activation):
    monkeypatch.setattr(linear_reference_module, "CHUNK_BYTES", 8 * 20 * 2)
    x, weight, bias, residual = inputs(37, 20, 77, torch.bfloat16, activation, device)
    how = {"activation": activation, "residual": residual, "config": SMALL}
    separate = linear(x, weight, bias, **how)
    assert linear(x, weight, bias, out=residual, **how) is residual
    assert torch.equal(residual, separate)


@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_rows_may_be_strided(device, dtype, split):
    x, weight, bias, residual = inputs(37, 20, 77, dtype, device=device)
    x, weight = (torch.nn.functional.pad(tensor, (0, 3), value=float("nan"))[:, :77] for tensor in (x, weight))
    residual = torch.nn.functional.pad(residual, (0, 5), value=float("nan"))[:, :20]
    storage = torch.full((37, 29), 7.0, dtype=dtype, device=device)
    out = storage[:, 4:24]
    assert linear(x, weight, bias, residual=residual, out=out, config=replace(SMALL, split=split)) is out
    assert relative_error(out, expected(x, weight, bias, None, residual)) <= TOLERANCE[dtype]
    assert (storage[:, :4] == 7).all()
    assert (storage[:, 24:] == 7).all()


def test_rows_beyond_32_bit_offsets(kernel_device):
    # The third row begins after element 2³¹ of a sparse file: only the touched pages exist.
    stride, inner = 2**30 + 64, 64
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sparse")
        with path.open("wb") as file:
            file.truncate(3 * stride * 2)
        if kernel_device.type == "cuda":
            storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=kernel_device)
        else:
            storage = torch.from_file(str(path), shared=True, size=3 * stride, dtype=torch.bfloat16)
        rows = storage.as_strided((3, inner), (stride, 1))
        near, weight, bias, residual = inputs(3, inner, inner, torch.bfloat16, device=kernel_device)
        want = expected(near, weight, bias, None, residual)
        rows.copy_(near)
        for split in (1, 2):
            y = linear(rows, weight, bias, residual=residual, config=replace(SMALL, split=split))
            assert relative_error(y, want) <= TOLERANCE[torch.bfloat16]
        rows.copy_(residual)
        linear(near, weight, bias, residual=rows, out=rows, config=SMALL)
        assert relative_error(rows, want) <= TOLERANCE[torch.bfloat16]
        del storage, rows


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_empty_results(kernel_device, shape):
    rows, columns, inner = shape
    x, weight = torch.empty(rows, inner, device=kernel_device), torch.empty(columns, inner, device=kernel_device)
    assert linear(x, weight).shape == (rows, columns)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation must be one of quick_gelu.*, or None, got 'relu'"),
        ({"weight": torch.zeros(6, 9)}, ValueError, r"weight must have shape \(6, 8\), got \(6, 9\)"),
        ({"weight": torch.zeros(8, 6).T}, ValueError, "weight must have last stride 1.*contiguous"),
        ({"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}, TypeError, "weight must be torch.float32.*bfloat16"),
        ({"weight": torch.zeros(5, 8), "bias": None, "activation": "silu_gated"}, ValueError, "even number of rows"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"residual": torch.zeros(4, 5)}, ValueError, r"residual must have shape \(4, 6\), got \(4, 5\)"),
        ({"out": torch.zeros(4, 6), "activation": "silu_gated"}, ValueError, r"out must have shape \(4, 3\)"),
        ({"x": torch.zeros(4, 0), "weight": torch.zeros(6, 0)}, ValueError, r"x must be \[M, K\] with K at least 1"),
        ({"x": torch.zeros(8)}, ValueError, r"x must be \[M, K\].*got shape \(8,\)"),
        ({"x": torch.zeros(8, 4).T}, ValueError, "x must have last stride 1.*contiguous"),
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x must be float32.*got torch.int32"),
        ({"valid_rows": ValidRows(4, torch.zeros(1))}, TypeError, "valid_rows.count must be torch.int32 on cpu"),
        (
            {"valid_rows": ValidRows(4, torch.zeros(2, dtype=torch.int32))},
            ValueError,
            r"valid_rows.count must be one number, got shape \(2,\)",
        ),
    ],
)
def test_invalid_arguments_are_rejected(change, error, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)} | change
    x, weight = arguments.pop("x"), arguments.pop("weight")
    with pytest.raises(error, match=message):
        linear(x, weight, arguments.pop("bias"), **arguments)


# -- valid rows ---------------------------------------------------------------------------------------------------------


# None; one tile and one row; whole tiles; more than there are.
@pytest.mark.parametrize(
    ("count", "operands", "split"),
    [(0, "pointers", 1), (33, "pointers", 3), (33, "descriptors", 1), (64, "descriptors", 3), (100, "pointers", 1)],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_valid_rows_are_exact_and_padding_tiles_zero(kernel_device, count, split, operands):
    x, weight, bias, residual = inputs(70, 20, 72, torch.bfloat16, "silu_gated_interleaved", kernel_device)
    how = {"activation": "silu_gated_interleaved", "config": replace(SMALL, split=split, operands=operands)}
    whole = linear(x, weight, bias, residual=residual, **how)
    # If K is split, the tile that is stored is that of the reduction.
    height = SMALL.block_rows if split == 1 else linear_module.REDUCE_ROWS
    zeros = min(70, align_up(count, height))
    # Tiles without valid rows are not read.
    x[zeros:], residual[zeros:] = float("nan"), float("nan")
    valid_rows = ValidRows(70, torch.tensor([count], dtype=torch.int32, device=kernel_device))
    y = linear(x, weight, bias, residual=residual, **how, valid_rows=valid_rows)
    assert torch.equal(y[:zeros], whole[:zeros])
    assert torch.equal(y[zeros:], torch.zeros_like(y[zeros:]))


def test_configuration_is_selected_for_the_planned_rows(kernel_device, monkeypatch):
    chosen = []

    def choose(rows, columns, inner, **options):
        chosen.append((rows, columns, inner, options["activation"], options["residual"]))
        return SMALL

    monkeypatch.setattr(linear_module, "choose_config", choose)
    x, weight, bias, residual = inputs(7, 20, 64, torch.float32, device=kernel_device)
    want = linear(x, weight, bias, residual=residual, config=SMALL)
    for planned in (7, 512):
        assert torch.equal(linear(x, weight, bias, residual=residual, valid_rows=ValidRows(planned)), want)
    linear(x, weight, activation="silu")
    assert chosen == [(7, 20, 64, None, True), (512, 20, 64, None, True), (7, 20, 64, "silu", False)]


# -- descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "activation", "split"),
    [(torch.float32, "gelu", 2), (torch.float16, None, 1), (torch.bfloat16, "silu_gated_interleaved", 2)],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_descriptors_give_the_bits_of_pointers(kernel_device, launched_with, dtype, activation, split):
    # 72 and 144 are not multiples of a block: the copy engine fills with zeros, as the masked loads do.
    for rows, inner in ((33, 72), (1, 144)):
        x, weight, bias, residual = inputs(rows, 20, inner, dtype, activation, kernel_device)
        how = {"activation": activation, "residual": residual}
        first, second = (
            linear(x, weight, bias, **how, config=replace(SMALL, split=split, operands=operands))
            for operands in ("pointers", "descriptors")
        )
        assert torch.equal(first, second)
    assert launched_with == [False, True] * 2


@pytest.mark.parametrize("gap", [0, 4, 8])
def test_unaligned_matrices_are_read_by_pointers(kernel_device, launched_with, gap):
    # Rows of 588 bf16 elements begin at multiples of 8 bytes; 4 more elements make it 16, 8 more do not.
    x, weight, bias, _ = inputs(5, 20, 588, torch.bfloat16, device=kernel_device)
    want = linear(x, weight, bias, config=SMALL)
    x, weight = (torch.nn.functional.pad(tensor, (0, gap), value=float("nan"))[:, :588] for tensor in (x, weight))
    y = linear(x, weight, bias, config=replace(SMALL, operands="descriptors"))
    assert torch.equal(y, want)
    assert launched_with == [False, gap == 4]


@pytest.fixture
def launched_with(monkeypatch):
    """Records for each launch if its operands are descriptors."""
    seen = []

    def make_operands(*arguments):
        found = real(*arguments)
        seen.append(found[2])
        return found

    real = linear_module.make_operands
    monkeypatch.setattr(linear_module, "make_operands", make_operands)
    return seen


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


# -- vendor GEMM --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_vendor_out_may_be_the_residual(kernel_device, activation, with_bias):
    x, weight, bias, residual = inputs(37, 20, 77, torch.bfloat16, device=kernel_device)
    bias = bias if with_bias else None
    apart = linear(x, weight, bias, activation=activation, residual=residual, config=VENDOR)
    assert linear(x, weight, bias, activation=activation, residual=residual, out=residual, config=VENDOR) is residual
    assert torch.equal(residual, apart)


def test_vendor_writes_only_into_out(kernel_device):
    x, weight, bias, residual = inputs(37, 20, 77, torch.bfloat16, device=kernel_device)
    storage = torch.full((37, 29), 7.0, dtype=torch.bfloat16, device=kernel_device)
    out = storage[:, 4:24]
    for added in (None, residual):
        assert linear(x, weight, bias, residual=added, out=out, config=VENDOR) is out
        assert relative_error(out, expected(x, weight, bias, None, added)) <= 1.5 * TOLERANCE[torch.bfloat16]
    assert (storage[:, :4] == 7).all()
    assert (storage[:, 24:] == 7).all()


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
                return y
            assert not name.startswith(("empty", "new_empty", "zeros"))
            return function(*arguments, **(options or {}))

    seen = []
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


def test_kernel_runs_what_the_vendor_cannot(kernel_device):
    x, weight, bias, _ = inputs(37, 20, 64, torch.bfloat16, "silu_gated", kernel_device)
    first, second = (linear(x, weight, bias, activation="silu_gated", config=config) for config in (SMALL, VENDOR))
    assert torch.equal(first, second)


# -- gates and configurations -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("activation", ["gelu", "silu_gated_interleaved"])
def test_passes_give_the_same_bits(kernel_device, activation):
    x, weight, bias, residual = inputs(37, 80, 64, torch.bfloat16, activation, kernel_device)
    how = {"activation": activation, "residual": residual}
    config = replace(SMALL, block_columns=64)
    once, *others = (linear(x, weight, bias, **how, config=replace(config, passes=passes)) for passes in (1, 2, 4))
    assert all(torch.equal(once, other) for other in others)
    assert relative_error(once, expected(x, weight, bias, activation, residual)) <= tolerance(torch.bfloat16, 2000)


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
