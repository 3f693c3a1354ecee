"""Activations and addition: both backends against fp64, at the ends of the range, and row by row."""

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.rowwise.activations import ACTIVATIONS, activation, add, compile_specs
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.config import ARCHITECTURES

# numpy's word for what a GPU does silently, and what the activations count on.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected(x, kind):
    """The formula in fp64."""
    x = x.double()
    functional = torch.nn.functional
    return {
        "quick_gelu": lambda: x * torch.sigmoid(1.702 * x),
        "gelu": lambda: functional.gelu(x),
        "gelu_tanh": lambda: functional.gelu(x, approximate="tanh"),
        "silu": lambda: functional.silu(x),
    }[kind]()


def matrix(rows, columns, dtype, device="cpu", seed=0):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1280), (7, 333), (40, 1152)])
@pytest.mark.usefixtures("poisoned_empty")
def test_activation_matches_fp64(device, kind, dtype, shape):
    x = matrix(*shape, dtype, device)
    assert relative_error(activation(x, kind), expected(x, kind)) <= tolerance(dtype, x.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_large_activation_matches_fp64(kernel_device, kind, dtype):
    x = matrix(4096, 5120, dtype, kernel_device)
    assert relative_error(activation(x, kind), expected(x, kind)) <= tolerance(dtype, x.numel())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_finite_and_accurate_far_from_zero(device, kind):
    # Where the exponential overflows the result is zero, not NaN; where it underflows it is x.
    far = torch.tensor([[100.0, 1e4, 1e9, 1e38]], device=device)
    torch.testing.assert_close(activation(far, kind), far, rtol=2e-7, atol=0)
    assert activation(-far, kind).abs().max() <= 1e-30
    assert torch.equal(activation(torch.zeros(1, 3, device=device), kind), torch.zeros(1, 3, device=device))
    largest_half = torch.tensor([[-65504.0, 65504.0]], dtype=torch.float16, device=device)
    assert activation(largest_half, kind).tolist() == [[0.0, 65504.0]]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_stays_nan(device, kind):
    assert bool(activation(torch.full((1, 3), float("nan"), device=device), kind).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_of_row_views_and_in_place(device, kind, dtype):
    want = activation(matrix(9, 200, dtype, device), kind)
    wide = matrix(9, 200, dtype, device).repeat(1, 2)
    untouched = wide[:, 200:].clone()
    view = wide[:, :200]
    assert torch.equal(activation(view, kind), want)
    assert activation(view, kind, out=view) is view
    assert torch.equal(view, want)
    assert torch.equal(wide[:, 200:], untouched)
    contiguous = matrix(9, 200, dtype, device)
    assert activation(contiguous, kind, out=contiguous) is contiguous
    assert torch.equal(contiguous, want)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.usefixtures("restore_threads")
def test_a_row_alone_equals_the_row_in_a_pack(kind, dtype, threads):
    torch.set_num_threads(threads)
    for columns, sizes in ((97, (2, 3, 700)), (1280, (3, 60, 101)), (4304, (40,))):
        row = matrix(1, columns, dtype, seed=1)
        alone = activation(row, kind)
        for rows in sizes:
            pack = matrix(rows, columns, dtype, seed=rows)
            places = (0, rows // 2, rows - 1)
            for place in places:
                pack[place] = row
            result = activation(pack, kind)
            assert all(torch.equal(result[place], alone[0]) for place in places), (columns, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_kernel_is_invariant_too(kernel_device, kind, dtype):
    pack = matrix(41, 1000, dtype, kernel_device)
    result = activation(pack, kind)
    for row in (0, 17, 40):
        assert torch.equal(activation(pack[row : row + 1], kind)[0], result[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_reference_and_kernel_differ_by_less_than_a_rounding(kernel_device, kind, dtype):
    x = matrix(33, 500, dtype, kernel_device)
    kernel = activation(x, kind)
    with dispatch.use("reference"):
        reference = activation(x, kind)
    assert relative_error(kernel, reference) <= TOLERANCE[dtype] / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_addition_is_exactly_torchs(device, dtype):
    x, y = matrix(13, 333, dtype, device), matrix(13, 333, dtype, device, seed=1)
    want = (x.double() + y.double()).to(dtype)
    assert torch.equal(add(x, y), want)
    wide = torch.zeros(13, 500, dtype=dtype, device=device)
    out = wide[:, :333]
    assert add(x, y, out=out) is out
    assert torch.equal(out, want)
    assert not wide[:, 333:].any()
    assert add(x, y, out=y) is y
    assert torch.equal(y, want)


def test_nothing_to_do(device):
    assert activation(torch.zeros(0, 8, device=device), "silu").shape == (0, 8)
    assert add(torch.zeros(3, 0, device=device), torch.zeros(3, 0, device=device)).shape == (3, 0)


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("x", "kind", "out", "error", "message"),
    [
        (X, "relu", None, ValueError, "quick_gelu, gelu, gelu_tanh, silu"),
        (X.double(), "silu", None, TypeError, "float64"),
        (X.int(), "silu", None, TypeError, "int32"),
        (X[0], "silu", None, ValueError, r"\(8,\)"),
        (X.t(), "silu", None, ValueError, "last stride 1"),
        (X, "silu", X.half(), TypeError, "out is torch.float16"),
        (X, "silu", X[:3], ValueError, r"out has shape \(3, 8\)"),
    ],
)
def test_activation_refusals(x, kind, out, error, message):
    with pytest.raises(error, match=message):
        activation(x, kind, out=out)


def test_addition_refusals():
    with pytest.raises(ValueError, match=r"y has shape \(4, 7\)"):
        add(X, X[:, :7])
    with pytest.raises(TypeError, match=r"y is torch\.float16"):
        add(X, X.half())
    with pytest.raises(ValueError, match=r"out has shape \(3, 8\)"):
        add(X, X, out=X[:3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_activation_is_compiled_ahead(architecture):
    specs = compile_specs(architecture)
    assert {spec.constants.get("ACTIVATION") for spec in specs} == {*ACTIVATIONS, None}
    assert len({spec.name for spec in specs}) == len(specs)
