"""Linear layer and epilogues: both backends against fp64, split K, and rows whose bits depend on no other row."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels import cpu
from tritontower.kernels import linear_reference as linear_reference_module
from tritontower.kernels.configs import ARCHITECTURES, SHARED_MEMORY_LIMIT
from tritontower.kernels.linear import (
    EPILOGUES,
    LinearConfig,
    compile_specs,
    default_config,
    linear,
)
from tritontower.kernels.linear_reference import linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = [None, *EPILOGUES]
SMALL = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1)
"""Several tiles in every direction for the shapes here, and a group of row tiles that is not full."""


def expected(x, weight, bias=None, activation=None, residual=None):
    """The formula in fp64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if activation == "silu_gated":
        gate, up = y.chunk(2, dim=1)
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
    width = columns * 2 if activation == "silu_gated" else columns
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(width, inner, generator=generator) / inner**0.5
    bias = torch.randn(width, generator=generator)
    residual = torch.randn(rows, columns, generator=generator)
    return [tensor.to(device, dtype) for tensor in (x, weight, bias, residual)]


# One row and few columns; a K that fills its blocks, and ragged rows and columns; 588 = 18 blocks and an end.
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 3, 77), (37, 40, 64), (70, 20, 588)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
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
    # With an activation there is a second rounding, of what it is applied to or of what the residual is added to.
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


@pytest.mark.parametrize("split", [2, 3, 64])
@pytest.mark.parametrize(("activation", "inner"), [(None, 128), ("gelu", 77), ("silu_gated", 200)])
@pytest.mark.usefixtures("poisoned_empty")
def test_split_sums_to_the_same_every_time(kernel_device, activation, inner, split):
    x, weight, bias, residual = inputs(37, 20, inner, torch.float32, activation, kernel_device)
    config = replace(SMALL, split=split)
    y = linear(x, weight, bias, activation=activation, residual=residual, config=config)
    again = linear(x, weight, bias, activation=activation, residual=residual, config=config)
    assert torch.equal(y, again)
    assert relative_error(y, expected(x, weight, bias, activation, residual)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_row_alone_has_the_bits_it_has_in_a_pack(kernel_device, dtype, split):
    x, weight, bias, residual = inputs(70, 20, 77, dtype, device=kernel_device)
    config = replace(SMALL, split=split)

    def run(rows):
        return linear(x[rows], weight, bias, activation="quick_gelu", residual=residual[rows], config=config)

    pack = run(slice(None))
    for start, stop in ((0, 1), (31, 33), (69, 70)):
        assert torch.equal(run(slice(start, stop)), pack[start:stop])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_row_alone_has_the_bits_it_has_in_a_pack(monkeypatch, threads, dtype, activation, fused):
    if not fused:
        monkeypatch.setattr(cpu, "onednn_multiplies", lambda dtype: False)
    monkeypatch.setattr(linear_reference_module, "_CHUNK_BYTES", 500 * 34 * 4)
    x, weight, bias, residual = inputs(1030, 34, 588, dtype, activation)

    def run(rows):
        plain = linear(x[rows], weight, bias, activation=activation)
        return plain, linear(x[rows], weight, bias, activation=activation, residual=residual[rows])

    pack = run(slice(None))
    for start, stop in ((0, 1), (17, 18), (1029, 1030), (5, 7), (40, 43), (100, 117), (0, 513), (3, 1028)):
        for part, whole in zip(run(slice(start, stop)), pack, strict=True):
            assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("inner", [77, 1176, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_row_invariant_for_strided_rows(threads, dtype, inner):
    storage, weight, bias, _ = inputs(600, 48, inner + 12, dtype)
    x, weight = storage[:, :inner], weight[:, :inner]
    pack = linear(x, weight, bias)
    for start, stop in ((0, 1), (9, 10), (50, 53), (599, 600)):
        assert torch.equal(linear(x[start:stop], weight, bias), pack[start:stop])


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("activation", [None, "gelu", "silu_gated"])
def test_out_may_be_the_residual(request, monkeypatch, backend, activation):
    monkeypatch.setattr(linear_reference_module, "_CHUNK_BYTES", 8 * 20 * 2)
    device = request.getfixturevalue("kernel_device") if backend == "kernel" else "cpu"
    rows = 37
    x, weight, bias, residual = inputs(rows, 20, 77, torch.bfloat16, activation, device)
    apart = linear(x, weight, bias, activation=activation, residual=residual, config=SMALL)
    result = linear(x, weight, bias, activation=activation, residual=residual, out=residual, config=SMALL)
    assert result is residual
    assert torch.equal(residual, apart)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 2])
def test_rows_may_stand_apart(request, backend, dtype, split):
    device = request.getfixturevalue("kernel_device") if backend == "kernel" else "cpu"
    x, weight, bias, residual = inputs(37, 20, 77, dtype, device=device)
    x, weight = (torch.nn.functional.pad(tensor, (0, 3), value=float("nan"))[:, :77] for tensor in (x, weight))
    residual = torch.nn.functional.pad(residual, (0, 5), value=float("nan"))[:, :20]
    storage = torch.full((37, 29), 7.0, dtype=dtype, device=device)
    out = storage[:, 4:24]
    result = linear(x, weight, bias, residual=residual, out=out, config=replace(SMALL, split=split))
    assert result is out
    assert relative_error(out, expected(x, weight, bias, None, residual)) <= TOLERANCE[dtype]
    assert (storage[:, :4] == 7).all()
    assert (storage[:, 24:] == 7).all()


def test_rows_beyond_32_bit_offsets(kernel_device):
    # The third row begins beyond element 2³¹ of a sparse file: only the pages touched exist.
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
def test_nothing_to_compute(kernel_device, shape):
    rows, columns, inner = shape
    x, weight = torch.empty(rows, inner, device=kernel_device), torch.empty(columns, inner, device=kernel_device)
    assert linear(x, weight).shape == (rows, columns)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "unknown activation 'relu'.*quick_gelu"),
        ({"weight": torch.zeros(6, 9)}, ValueError, r"weight has shape \(6, 9\).*\[N, 8\]"),
        ({"weight": torch.zeros(8, 6).T}, ValueError, "weight.*strides.*contiguous"),
        ({"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}, TypeError, "weight is torch.bfloat16.*float32"),
        ({"weight": torch.zeros(5, 8), "bias": None, "activation": "silu_gated"}, ValueError, "even number of rows"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\).*\[6\]"),
        ({"residual": torch.zeros(4, 5)}, ValueError, r"residual has shape \(4, 5\).*\(4, 6\)"),
        ({"out": torch.zeros(3, 6)}, ValueError, r"out has shape \(3, 6\).*\(4, 6\)"),
        ({"out": torch.zeros(4, 6), "activation": "silu_gated"}, ValueError, r"out has shape.*\(4, 3\)"),
        ({"x": torch.zeros(4, 0), "weight": torch.zeros(6, 0)}, ValueError, r"x has shape \(4, 0\).*K at least 1"),
        ({"x": torch.zeros(8)}, ValueError, r"x has shape \(8,\).*\[M, K\]"),
        ({"x": torch.zeros(8, 4).T}, ValueError, "x.*strides.*contiguous"),
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x is torch.int32"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)} | change
    x, weight = arguments.pop("x"), arguments.pop("weight")
    with pytest.raises(error, match=message):
        linear(x, weight, arguments.pop("bias"), **arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_split_few_rows_only(architecture):
    def split(rows):
        config = default_config(rows, 3584, 5120, dtype=torch.bfloat16, activation=None, architecture=architecture)
        return config.split

    assert split(1) == split(64) > 1
    assert split(65) == split(256) > 1
    assert split(257) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_tiles_fit_shared_memory(architecture):
    for spec in compile_specs(architecture):
        constants = spec.constants
        if "BLOCK_INNER" not in constants:
            continue
        size = {"*fp32": 4}.get(spec.signature["X"], 2)
        columns = constants["BLOCK_COLUMNS"] * (2 if constants.get("ACTIVATION") == "silu_gated" else 1)
        held = (constants["BLOCK_ROWS"] + columns) * constants["BLOCK_INNER"] * size * spec.num_stages
        assert held <= SHARED_MEMORY_LIMIT[architecture], spec.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compile_specs_describe_every_argument(architecture):
    specs = compile_specs(architecture)
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert set(spec.kernel.arg_names) == set(spec.signature) | set(spec.constants), spec.name
        assert set(spec.divisible_by_16) <= set(spec.signature), spec.name


def test_reference_allocates_its_result():
    x, weight, bias, _ = inputs(3, 4, 8, torch.float32)
    assert relative_error(linear_reference(x, weight, bias), expected(x, weight, bias)) <= TOLERANCE[torch.float32]
